"""A user's image and caption transforms: what they are given, and checks of what they return.

Shapes: H, W of a decoded picture, before and after.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llip.data.captions import BadSample
from llip.errors import UserError
from llip.extensions import describe_failure, find_extension

EMPTY_CAPTION = "caption_transform returned no text"


def transform_function(field: str, name: str | None) -> Callable[[Any, int], Any] | None:
    """Return the function that a config field names, None if it names none.

    Raises:
        UserError: it cannot be found, or is not callable.
    """
    return None if name is None else find_extension(field, name)


def transform_caption(function: Callable[[str, int], str], caption: str, seed: int) -> str:
    """Return the transformed caption.

    Raises:
        BadSample: no text is left. UserError: the function fails, or does not return text.
    """
    result = _call("caption_transform", function, caption, seed)
    if not isinstance(result, str):
        raise UserError(f"caption_transform {_name(function)} returned {type(result).__name__}, expected str")
    if not result.strip():
        raise BadSample(EMPTY_CAPTION)
    return result


def transform_image(function: Callable[[np.ndarray, int], np.ndarray], pixels: Tensor, seed: int) -> Tensor:
    """Return the transformed picture [3, H, W] uint8 of `pixels` [3, H, W]; the function sees and returns [H, W, 3].

    Raises:
        UserError: the function fails, or does not return uint8 pixels [H, W, 3].
    """
    image = pixels.permute(1, 2, 0).numpy().copy()  # the decoder reuses its memory
    result = _call("image_transform", function, image, seed)
    shape = getattr(result, "shape", None)
    if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.ndim != 3 or result.shape[2] != 3:
        dtype = getattr(result, "dtype", type(result).__name__)
        raise UserError(
            f"image_transform {_name(function)} returned {dtype} of shape {shape}, expected a numpy array of uint8 "
            "[H, W, 3]"
        )
    if 0 in result.shape:
        raise UserError(f"image_transform {_name(function)} returned an empty image of shape {shape}")
    return torch.from_numpy(np.ascontiguousarray(result)).permute(2, 0, 1)


def _call(field: str, function: Callable[[Any, int], Any], value: Any, seed: int) -> Any:
    try:
        return function(value, seed)
    except (Exception, SystemExit) as error:
        file = getattr(sys.modules.get(function.__module__), "__file__", None) or ""
        raise UserError(f"{field} {_name(function)} failed: {describe_failure(error, file)}") from error


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", repr(function))
