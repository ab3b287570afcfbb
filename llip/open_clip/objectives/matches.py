"""Which text of the global batch belongs to which image.

Shapes: B images of this process (and its micro-batches), N captions per image, T = W B N texts of the global batch
over W processes.

Texts come in the order (process, micro-batch, image, caption), so text j belongs to global image j // N, and the pairs
of image and own text are N diagonals of the scores: a view, without indices of the size of the scores.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Matches:
    """What an objective knows beside the scores [B, T] of this process's images with all texts.

    Attributes:
        images: B.
        texts: T.
        captions: N.
        offset: global number of this process's first image.
        mask: [T], False for texts that do not count; None: all count.
    """

    images: int
    texts: int
    captions: int = 1
    offset: int = 0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        layout = f"{self.images} images with {self.captions} texts each at offset {self.offset}"
        assert self.texts % self.captions == 0, f"{layout} do not divide {self.texts}"
        assert 0 <= self.offset <= self.all_images - self.images, f"{layout} exceed {self.texts} texts"

    @property
    def all_images(self) -> int:
        """Images of the global batch, W B."""
        return self.texts // self.captions

    def positives(self, scores: Tensor) -> Tensor:
        """Return the entries of [B, T] where image and text belong together, as a view [N, B]."""
        return scores.unflatten(1, (-1, self.captions)).diagonal(self.offset)

    def local(self, texts: Tensor) -> Tensor:
        """Return those entries of [T] that are of this process's texts, as a view [N, B]."""
        return texts.unflatten(0, (-1, self.captions))[self.offset : self.offset + self.images].T

    def owners(self, device: torch.device | None = None) -> Tensor:
        """Return the global number of each text's image [T]; row i of the scores is image `offset + i`."""
        return torch.arange(self.texts, device=device) // self.captions

    def hide(self, values: Tensor, value: float) -> Tensor:
        """Set the entries [..., T] of masked texts to `value`, in place."""
        return values if self.mask is None else values.masked_fill_(~self.mask, value)

    def local_mask(self, like: Tensor) -> Tensor:
        """Return 1 for each text of this process and 0 for a masked one [N, B], in the type and device of `like`."""
        if self.mask is None:
            return like.new_ones(self.captions, self.images)
        return self.local(self.mask).to(like.dtype)

    def texts_per_process(self, like: Tensor) -> Tensor:
        """Return the texts of the global batch that count, over W []; the same on every process."""
        places = like.new_full((), self.images * self.captions)  # no copy from the host: it would wait
        return places if self.mask is None else places * self.mask.to(like.dtype).mean()
