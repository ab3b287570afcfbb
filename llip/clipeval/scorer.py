"""A model and what goes with it: from images and texts to scores.

Shapes: B images, T texts, K mixture tokens, D embedding width. An image's feature may depend on the text, so images
meet texts only in `model.similarity`.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.clipeval.loading import Preprocess
from llip.errors import UserError
from llip.open_clip.model import Llip

TEXT_BATCH = 512
_IMAGES_AT_ONCE = 64  # whose text-free features are computed, from tokens that need not all be on the device
_row = "image {} of the batch".format


@dataclass(frozen=True)
class Scorer:
    """Everything that turns images and texts into scores.

    The model answers `encode_image`, `encode_text`, `similarity` and (for shortlists) `pooling.global_feature`
    as `llip.open_clip.model.Llip` does. Towers run under autocast when `autocast_dtype` is given; scores are always
    float32. Values that are not finite raise a `UserError` that names the first bad parameter, else the first bad
    input.
    """

    model: Llip
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def encode_images(self, images: Tensor, name: Callable[[int], str] = _row) -> Tensor:
        """Map normalised images [B, 3, H, W] to mixture tokens [B, K, D], float32, on the device; `name` of a row."""
        with self._autocast():
            h = self.model.encode_image(images.to(self.device)).float()
        return require_finite(h, self.model, "image features", name)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Map T texts to unit-norm features [T, D], float32, on the device."""
        parts = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenizer(list(texts[start : start + TEXT_BATCH])).to(self.device)
            with self._autocast():
                parts.append(self.model.encode_text(tokens).float())
        features = require_finite(torch.cat(parts), self.model, "text features", lambda row: f"text {texts[row]!r}")
        return F.normalize(features, dim=-1)

    def scores(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the cosines [B, T], float32, of mixture tokens [B, K, D] and text features [T, D]."""
        return require_finite(self.model.similarity(h, t).float(), self.model, "scores", _row)

    def text_free_features(self, h: Tensor) -> Tensor:
        """Return unit-norm features [B, D] on the device, the same for every text, of mixture tokens [B, K, D]."""
        blocks = (block.to(self.device) for block in h.split(_IMAGES_AT_ONCE))
        features = torch.cat([self.model.pooling.global_feature(block).float() for block in blocks])
        return require_finite(features, self.model, "image features", _row)


def require_finite(values: Tensor, model: nn.Module, what: str, name: Callable[[int], str]) -> Tensor:
    """Return `values` [N, ...] if all are finite: sorting NaN would give every class the same accuracy silently.

    Args:
        model: computed the values. what: the values, in words. name: describes the input of a row.

    Raises:
        UserError: names the first parameter or buffer that is not finite, else the first such row's input.
    """
    if values.isfinite().all():
        return values
    for parameter, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if bad := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{what} are not finite: {bad} of {tensor.numel()} values of parameter {parameter} are NaN or inf; "
                "the checkpoint is of a diverged run, evaluate an earlier one"
            )
    row = int((~values.isfinite().flatten(1).all(dim=1)).nonzero()[0])
    raise UserError(
        f"{what} are not finite for {name(row)}, though all parameters are; in half precision, evaluate in fp32"
    )
