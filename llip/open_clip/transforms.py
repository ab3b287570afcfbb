"""PIL images to what the towers take: OpenCLIP's transforms, for images of any mode."""

from collections.abc import Callable

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

from llip.errors import UserError
from llip.open_clip.pixels import to_rgb

IMAGE_MEAN, IMAGE_STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
CROP_SCALE = (0.9, 1.0)
"""Share of an image's area that a training crop keeps (OpenCLIP's default)."""
RESIZE_MODES = ("shortest", "squash")
"""How evaluation images are resized: the shorter side, then the centre cropped (the default), or both sides."""


class ImageTransform:
    """A PIL image of any mode -> normalised float [3, S, S]; greys of 16 bits are scaled, as in training."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        """`transform`: of RGB images."""
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            raise UserError(f"expected one PIL image, got {type(image).__name__}; for several, stack the results")
        return self.transform(to_rgb(image))

    def __repr__(self) -> str:
        return f"ImageTransform({self.transform!r})"


def image_transforms(image_size: int, resize_mode: str = RESIZE_MODES[0]) -> tuple[ImageTransform, ImageTransform]:
    """Return the training and the evaluation transform.

    Args:
        image_size: pixels per side.
        resize_mode: of the evaluation transform, one of `RESIZE_MODES`.
    """
    common = {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    train = open_clip.image_transform(image_size, is_train=True, aug_cfg={"scale": CROP_SCALE}, **common)
    val = open_clip.image_transform(image_size, is_train=False, resize_mode=resize_mode, **common)
    return ImageTransform(train), ImageTransform(val)
