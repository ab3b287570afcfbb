"""Encoded image bytes to the pixels a model trains on: decoded, cropped, resized. Fast, on one thread.

The reference is PIL: `Image.open(...).convert("RGB")` (16-bit greys scaled, not clipped), crop, bicubic resize, EXIF
orientation ignored as OpenCLIP does. An ordinary JPEG takes a fast decoder that gives the same pixels; what that
decoder does not support or warns about goes to PIL, which decides whether it is an image.

Shapes: H, W of the picture, S image size. Tensors are views of row-major RGB memory: their strides are channels-last.
"""

import functools
import io
import math
import random
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor

from llip.data.captions import BadSample
from llip.open_clip.pixels import to_rgb
from llip.open_clip.transforms import RESIZE_MODES

MAX_PIXELS = 89_478_485
"""Pictures of more pixels are not decoded. Here PIL starts to warn of decompression bombs."""

NO_IMAGE = "no image"
EMPTY, NOT_AN_IMAGE, TRUNCATED, DAMAGED, TOO_LARGE = (
    "empty image",
    "not an image",
    "truncated image",
    "damaged image",
    "image of too many pixels",
)
"""Reasons of the `BadSample`s raised here."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_COLORS = ("YCbCr", "Gray", "RGB")  # not four channels, which PIL inverts or not by the Adobe marker
_SCRATCH_BYTES = 24 * 2**20  # largest picture that is decoded into reused memory, so that a worker stays small
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # not EPS, for which PIL starts a program


class CropBox(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class ImageReader:
    """Reads pictures as training images. Reuses memory between pictures: for one thread."""

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] | None,
        max_pixels: int = MAX_PIXELS,
        resize_mode: str = RESIZE_MODES[0],
    ) -> None:
        """Prepare for images of `size` pixels a side.

        Args:
            size: of an image.
            scale: range of the share of a picture's area that a random crop shows; None: the evaluation's center crop.
            max_pixels: largest H x W that is decoded.
            resize_mode: of the center crop, see `center_crop`.
        """
        self.size, self.scale, self.max_pixels, self.resize_mode = size, scale, max_pixels, resize_mode
        self._scratch = np.empty(0, np.uint8)

    def read(self, data: bytes, rng: random.Random, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the picture in `data`, transformed if asked, cropped (at random, as `rng` draws), [3, S, S] uint8.

        Raises:
            BadSample: the picture cannot be used.
        """
        pixels = decode_image(data, self.max_pixels, self._reuse)
        if transform is not None:
            pixels = transform(pixels)
        if self.scale is None:
            return center_crop(pixels, self.size, self.resize_mode)
        _, height, width = pixels.shape
        return resize_crop(pixels, crop_box(height, width, rng, self.scale), self.size)

    def _reuse(self, size: int) -> np.ndarray | None:
        """Return memory of at least `size` bytes that holds the previous picture, None for a large one."""
        if size > _SCRATCH_BYTES:
            return None
        if size > self._scratch.size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, memory: Callable[[int], np.ndarray | None] | None = None
) -> Tensor:
    """Return the picture in `data`, the first one of an animation, as RGB [3, H, W] uint8.

    Args:
        data: bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or (where PIL has it) AVIF file.
        max_pixels: largest H x W that is decoded. What PIL reads must also be within PIL's own limit.
        memory: returns, for a number of bytes, where a JPEG may be decoded to; None: new memory.

    Raises:
        BadSample: no bytes, not an image, a truncated or damaged one, or one of too many pixels.
    """
    shape = _jpeg_shape(data)
    if shape is None:
        return _decode_other(data, max_pixels)
    if math.prod(shape) > max_pixels:
        raise BadSample(TOO_LARGE)
    try:
        buffer = memory(3 * math.prod(shape)) if memory else None
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=True)
    except ValueError:  # libjpeg warned or failed; PIL ignores some of the warnings
        return _decode_other(data, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crop_box(
    height: int,
    width: int,
    rng: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float] = _RATIO,
) -> CropBox:
    """Draw a box inside a picture of `height` x `width`, distributed as by torchvision's `RandomResizedCrop`.

    The fraction of the area is uniform in `scale`, and the logarithm of width / height is uniform over `ratio`. If no
    draw fits into the picture, the box is the largest central one whose aspect ratio is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = rng.randrange(height - box_height + 1)
            return CropBox(top, rng.randrange(width - box_width + 1), box_height, box_width)
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return CropBox((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resize_crop(image: Tensor, box: CropBox, size: int) -> Tensor:
    """Return the part `box` of `image` [3, H, W] uint8, resized to [3, size, size] uint8 (bicubic, antialiased).

    Pixels outside the box have no influence, as in PIL's crop and resize. The result never shares memory with `image`.
    """
    assert image.dtype == torch.uint8, f"expected uint8 pixels, got {image.dtype}"
    part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # torch resizes channels-last bytes with vector instructions, which saves more than the copy costs
    part = part.contiguous(memory_format=torch.channels_last)
    return interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: int, resize_mode: str) -> Tensor:
    """Return `image` [3, H, W] uint8 as the evaluation's transform crops it, [3, size, size] uint8.

    Args:
        image: of any shape.
        size: pixels a side.
        resize_mode: shortest: the shorter side becomes `size`, the center is kept; squash: both sides become `size`.

    Raises:
        BadSample: a picture so narrow that its resized form has too many pixels.
    """
    _, height, width = image.shape
    resized = (size, size)
    if resize_mode == "shortest":  # torchvision's rounding
        short = min(height, width)
        resized = (size * height // short, size * width // short)
        if math.prod(resized) > MAX_PIXELS:
            raise BadSample(TOO_LARGE)
    part = image[None].contiguous(memory_format=torch.channels_last)
    if resized != (height, width):
        part = interpolate(part, size=resized, mode="bicubic", antialias=True)
    top, left = (round((side - size) / 2) for side in resized)
    return part[0, :, top : top + size, left : left + size].clone()


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Return (H, W) from the header of a JPEG that the fast decoder supports, None for everything else."""
    if data[:3] != _JPEG_START:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colors in _JPEG_COLORS else None


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()  # imports all of PIL's formats in a fraction of a second, which a dataset of JPEGs never spends
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_other(data: bytes, max_pixels: int) -> Tensor:
    if not data:
        raise BadSample(EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata, once per picture
        try:
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:  # reads the header only
                if image.width * image.height > max_pixels:
                    raise BadSample(TOO_LARGE)
                return pil_to_tensor(to_rgb(image))
        except (BadSample, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise BadSample(NOT_AN_IMAGE) from error
        except Image.DecompressionBombError as error:
            raise BadSample(TOO_LARGE) from error
        except Exception as error:  # PIL raises many kinds for damaged bytes, and only its words say "truncated"
            raise BadSample(TRUNCATED if "truncated" in str(error).lower() else DAMAGED) from error
