"""What every image tower with mixture tokens shares: copies that count as one, and the source's pixel statistics.

Shapes: B images, K mixture tokens, N tokens in the sequence (K and the kept patches).

**Copies that count as one.** Start K tokens as copies of a source's one class token, and the tower is no longer the
source: under the softmax every query sees exp(q . k) not once but K times. Adding -log K to the attention logits of
the K keys, for every query, takes that back exactly:

    sum over the copies of exp(q . k - log K) = K exp(q . k) / K = exp(q . k)

so numerator and denominator are the source's, for patches and for the tokens themselves, in every block: the outputs
of the K tokens are K times the source's class token, those of the patches are the source's patches. In general a key
that stands for one of c copies gets -log c; a token that is no copy gets 0.

The offsets [K] are a constant of the model: they say how often a token was copied. Training moves the tokens (and so
their keys) apart and needs no gradient of the offsets, which would cost a reduction over all pairs of tokens in every
block. They are kept as a buffer, so that a checkpoint carries them, and only where there are copies: a tower trained
from scratch has no such buffer, passes no mask, and runs the kernels it always ran.

**Pixel statistics.** Images reach every tower normalised with OpenAI's mean and deviation. A source trained on others
sees its own: x' = scale x + shift per channel, kept as buffers like the offsets, and again only where they are needed.
"""

import torch
from torch import Tensor, nn

from llip.open_clip.transforms import IMAGE_MEAN, IMAGE_STD

OPTIONAL_BUFFERS = ("key_offset", "pixel_scale", "pixel_shift")
"""Buffers that a tower has only if its weights brought them."""


def copies_offset(copies: Tensor) -> Tensor:
    """Return the attention offsets [K] of tokens that each stand for one of `copies` [K] equal ones."""
    return -copies.double().log().float()


class MixtureTower(nn.Module):
    """Base of the image towers: images [B, 3, H, W] in, mixture tokens [B, K, D] out.

    After `give_patches` the outputs of the patches follow them, through the same norm and projection: [B, K + L, D].

    Subclasses set the sizes below and define how foreign weights become theirs (`fit_source`).
    """

    mixture_tokens: int
    image_size: tuple[int, int]
    grid_size: tuple[int, int]
    gives_patches = False
    takes_any_size = False
    key_offset: Tensor | None
    pixel_scale: Tensor | None
    pixel_shift: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in OPTIONAL_BUFFERS:
            self.register_buffer(name, None)

    @property
    def output_tokens(self) -> int:
        """K, or K + L, without patch dropout."""
        return self.mixture_tokens + (self.grid_size[0] * self.grid_size[1] if self.gives_patches else 0)

    def give_patches(self) -> None:
        """Return patch outputs too from now on.

        Raises:
            UserError: the tower has none in the space of the mixture tokens.
        """
        self.gives_patches = True

    def adopt_buffers(self, state: dict[str, Tensor]) -> None:
        """Make room for the optional buffers that `state` (the tower's, without prefix) brings."""
        device = next(self.parameters()).device
        for name in OPTIONAL_BUFFERS:
            if name in state:
                size = self.mixture_tokens if name == "key_offset" else 3
                setattr(self, name, torch.zeros(size, device=device))

    def fit_source(self, state: dict[str, Tensor], spread: float) -> list[str]:
        """Turn the weights of a source without mixture tokens into this tower's, in place.

        Args:
            state: the tower's part of a checkpoint, without prefix.
            spread: size of the seeded differences between copies, as a share of their root mean square.

        Returns:
            What was done, one sentence each, for the report.
        """
        raise NotImplementedError

    def frozen_features(self, images: Tensor) -> Tensor:
        """Return what the part below the head gives for images [B, 3, H, W]: features [B, L, W].

        A tower without a `mixture_head` is that part in full: these are its outputs.
        """
        return self(images)

    def from_features(self, features: Tensor) -> Tensor:
        """Return what `forward` returns, from `frozen_features` [B, L, W]."""
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, the same values."""
        raise NotImplementedError

    def default_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and deviation [3] that foreign weights of this tower expect by default, None: OpenAI's."""
        return None

    def set_pixel_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Convert images to the normalisation by `mean` and `std` [3] that the weights expect."""
        scale = torch.tensor(IMAGE_STD, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        shift = torch.tensor(IMAGE_MEAN, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)
        if tuple(mean) == tuple(IMAGE_MEAN) and tuple(std) == tuple(IMAGE_STD):
            self.pixel_scale = self.pixel_shift = None
            return
        device = next(self.parameters()).device
        self.pixel_scale = scale.float().to(device)
        self.pixel_shift = (shift / torch.tensor(std, dtype=torch.float64)).float().to(device)

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and deviation [3] of the normalisation that the source's own weights expect."""
        if self.pixel_scale is None or self.pixel_shift is None:
            return list(IMAGE_MEAN), list(IMAGE_STD)
        std = torch.tensor(IMAGE_STD, dtype=torch.float64) / self.pixel_scale.double().cpu()
        mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64) - self.pixel_shift.double().cpu() * std
        return [round(x, 6) for x in mean.tolist()], [round(x, 6) for x in std.tolist()]

    def source_pixels(self, images: Tensor) -> Tensor:
        """Return normalised images [B, 3, H, W] as the weights expect them."""
        if self.pixel_scale is None or self.pixel_shift is None:
            return images
        scale, shift = (x.to(images.dtype).view(3, 1, 1) for x in (self.pixel_scale, self.pixel_shift))
        return images * scale + shift

    def attention_mask(self, tokens: Tensor) -> Tensor | None:
        """Return what is added to the attention logits [N, N] of tokens [B, N, W], None where there are no copies."""
        if self.key_offset is None:
            return None
        length = tokens.shape[1]
        patches = self.key_offset.new_zeros(length - self.mixture_tokens)
        row = torch.cat([self.key_offset, patches]).to(tokens.dtype)
        return row.expand(length, length)
