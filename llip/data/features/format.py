"""Frozen features instead of an image and its captions: how a cached sample holds them.

A sample of a feature cache has the key and the caption members of its source, and

    image.npy                 [L, W]  what the frozen part of the image tower gives
    text.npy, text.json       [n, W]  what the frozen text encoder gives for the n captions that the json lists
    image.error               instead of all these: why the sample cannot be used

An unusable sample keeps its place, so that samples are numbered, shuffled and dropped as those of the source. Arrays
are numpy's files of float16, of int8 with one float32 scale per row (`image.scale.npy` [L]), or of bfloat16 as uint16,
since numpy has no such type.

Shapes: L features of an image, W their width, n captions of an image.
"""

import dataclasses
import functools
import io
import json
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llip.data.captions import BadSample

FeatureDtype = Literal["fp16", "bf16", "int8"]
ERROR, IMAGE, TEXT = "image.error", "image", "text"
DAMAGED = "damaged features"
NOT_CACHED = "caption is not in the feature cache"

_STORED = {"fp16": np.float16, "bf16": np.uint16, "int8": np.int8}
_LARGEST = {"fp16": 65504.0, "bf16": math.inf, "int8": 65504.0}  # int8 is read as float16
_BLOCK = 512  # of a tar


@dataclasses.dataclass(frozen=True)
class FeatureFormat:
    """What the features of a cache look like."""

    dtype: FeatureDtype
    image: tuple[int, int]  # L, W
    text: int | None  # W; None: captions are tokenized as ever

    @property
    def array_dtype(self) -> type:
        """Numpy's type of features that have been read; that of `to_tensor`'s argument."""
        return np.uint16 if self.dtype == "bf16" else np.float16

    def to_tensor(self, features: np.ndarray) -> Tensor:
        """Return features as float16 or bfloat16, sharing their memory."""
        if self.dtype == "bf16":
            return torch.from_numpy(features.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(features)

    def image_bytes(self) -> int:
        """Return what one image takes in a tar."""
        return array_bytes(self.dtype, self.image)

    def text_bytes(self, captions: float) -> int:
        """Return what the features of `captions` captions of one image take in a tar."""
        return 0 if self.text is None else array_bytes(self.dtype, (captions, self.text)) + 2 * _BLOCK

    def read(self, sample: dict[str, Any], captions: list[str]) -> tuple[np.ndarray, list[Any]]:
        """Return the image's features [L, W], and those of the captions [W] each, or the captions if they have none.

        Raises:
            BadSample: the sample cannot be used, a caption is not there, or the features are damaged.
        """
        if ERROR in sample:
            raise BadSample(sample[ERROR].decode(errors="replace"))
        image = self._read(sample, IMAGE, self.image)
        return image, captions if self.text is None else self._read_captions(sample, captions, self.text)

    def _read_captions(self, sample: dict[str, Any], captions: list[str], width: int) -> list[np.ndarray]:
        try:
            rows = {caption: row for row, caption in enumerate(json.loads(sample[f"{TEXT}.json"]))}
            wanted = [rows[caption] for caption in captions]
        except KeyError as error:
            raise BadSample(NOT_CACHED) from error
        except (ValueError, TypeError) as error:
            raise BadSample(DAMAGED) from error
        features = self._read(sample, TEXT, (len(rows), width))
        return [features[row] for row in wanted]

    def _read(self, sample: dict[str, Any], name: str, shape: tuple[int, int]) -> np.ndarray:
        try:
            stored = read_array(sample[f"{name}.npy"])
            if stored.dtype != _STORED[self.dtype] or stored.shape != shape:
                raise BadSample(DAMAGED)
            if self.dtype != "int8":
                return stored
            scale = read_array(sample[f"{name}.scale.npy"])
            return (stored * scale[:, None]).astype(np.float16)
        except (KeyError, ValueError, IndexError) as error:
            raise BadSample(DAMAGED) from error


def array_bytes(dtype: FeatureDtype, shape: tuple[float, float]) -> int:
    """Return what an array takes in a tar, with its header and, for int8, its scales."""
    rows, width = shape
    values = tar_bytes(128 + np.dtype(_STORED[dtype]).itemsize * rows * width)
    return values + (tar_bytes(128 + 4 * rows) if dtype == "int8" else 0)


def tar_bytes(size: float) -> int:
    """Return what a member of `size` bytes takes in a tar, with its header."""
    return _BLOCK + _BLOCK * math.ceil(size / _BLOCK)


def fits(features: Tensor, dtype: FeatureDtype) -> bool:
    """Return whether features are finite, and within the range of the type."""
    return bool((features.abs() <= _LARGEST[dtype]).all() & features.isfinite().all())


def write_features(name: str, features: Tensor, dtype: FeatureDtype) -> dict[str, bytes]:
    """Return the members that hold features [rows, W] on the CPU: `NAME.npy`, and `NAME.scale.npy` for int8."""
    if dtype == "fp16":
        return {f"{name}.npy": _npy(features.half().numpy())}
    if dtype == "bf16":
        return {f"{name}.npy": _npy(features.bfloat16().view(torch.int16).numpy().view(np.uint16))}
    scale = features.float().abs().amax(dim=1).clamp(min=1e-30) / 127
    values = (features.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {f"{name}.npy": _npy(values.numpy()), f"{name}.scale.npy": _npy(scale.numpy())}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_array(data: bytes) -> np.ndarray:
    """Return the array of a `.npy` file of version 1, a read-only view of `data`.

    Raises:
        ValueError: the bytes are no such file, or of objects.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _array_header(data[:start])
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@functools.lru_cache(maxsize=1024)
def _array_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type; the headers of a cache are few, and parsing one costs more than reading an array."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("expected version 1 of the npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype.hasobject:
        raise ValueError("expected rows of numbers")
    return shape, dtype
