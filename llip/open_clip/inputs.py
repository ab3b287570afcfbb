"""What a model accepts: one clear error for each way to call it wrongly.

Shapes: B images, T texts, K mixture tokens, C context length, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from llip.errors import UserError

_UNIT = 0.05
"""How far a text's norm may be from 1: more than bfloat16 rounds."""


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_images(images: Any, size: tuple[int, int] | None) -> None:
    """Raise a UserError for anything but float images [B, 3, H, W], of `size` where the tower has a fixed one."""
    if not isinstance(images, Tensor):
        raise UserError(
            f"images: expected a tensor [B, 3, H, W], got {_describe(images)}; "
            "torch.stack([model.preprocess_val(image) for image in images]) makes one of PIL images"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images: expected [B, 3, H, W], got {_describe(images)}; one image needs images[None]")
    if not images.is_floating_point():
        raise UserError(f"images: expected normalised floats, got {_describe(images)}; see model.normalise")
    if images.shape[0] == 0:  # len() would fix the size of an exported program
        raise UserError("images: expected one or more, got none")
    if size is not None and tuple(images.shape[2:]) != size:
        height, width = size
        raise UserError(
            f"images: expected {height} x {width} pixels, got {_describe(images)}; see model.preprocess_val"
        )


def check_tokens(tokens: Any, context_length: int | None) -> None:
    """Raise a UserError for anything but token ids [T, C] of at most `context_length`."""
    if not isinstance(tokens, Tensor):
        raise UserError(f"texts: expected token ids [T, C], got {_describe(tokens)}; see model.tokenizer")
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise UserError(f"texts: expected token ids [T, C], got {_describe(tokens)}")
    if tokens.shape[0] == 0:
        raise UserError("texts: expected one or more, got none")
    if context_length is not None and tokens.shape[1] > context_length:
        raise UserError(f"texts: expected at most {context_length} tokens each, got {_describe(tokens)}")


def check_cached(features: Any, dimensions: str) -> None:
    """Raise a UserError for anything but float features of these dimensions, as in [B, L, W]."""
    sizes = dimensions.count(",") + 1
    if not isinstance(features, Tensor) or features.ndim != sizes or not features.is_floating_point():
        raise UserError(f"features: expected frozen features {dimensions}, got {_describe(features)}")
    if features.shape[0] == 0:
        raise UserError("features: expected one or more rows, got none")


def check_features(h: Any, t: Any, tokens: int | None, *, unit_norm: bool) -> None:
    """Raise a UserError for features that do not fit together.

    Args:
        h: expected to be mixture tokens [B, K, D].
        t: expected to be text features [T, D].
        tokens: of an image; None: any number (patch dropout).
        unit_norm: check the norms of the texts, too, which waits for the device.
    """
    for name, value, dimensions in (("h", h, "[B, K, D]"), ("t", t, "[T, D]")):
        if not isinstance(value, Tensor) or value.ndim != dimensions.count(",") + 1 or not value.is_floating_point():
            source = "encode_image" if name == "h" else "encode_text"
            raise UserError(f"{name}: expected features {dimensions} from {source}, got {_describe(value)}")
        if value.shape[0] == 0:
            raise UserError(f"{name}: expected one or more {'images' if name == 'h' else 'texts'}, got none")
    if h.shape[1] != (tokens or h.shape[1]) or h.shape[2] != t.shape[1]:
        raise UserError(f"h {list(h.shape)} and t {list(t.shape)}: expected [B, {tokens or 'K'}, D] and [T, D]")
    if unit_norm and t.device.type != "meta" and not torch.compiler.is_compiling():
        norms = t.detach().float().norm(dim=-1)
        least, most = torch.stack([norms.min(), norms.max()]).tolist()
        if least < 1 - _UNIT or most > 1 + _UNIT:
            raise UserError(
                f"t: expected text features of unit norm, got norms from {least:.3g} to {most:.3g}; encode_text "
                "returns them so, averages need torch.nn.functional.normalize"
            )
