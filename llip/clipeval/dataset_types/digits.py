"""scikit-learn's handwritten digits: real images in a package, so that a real task runs everywhere."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llip.clipeval.datasets import DatasetSpec, ImageSource, dataset_type
from llip.errors import UserError

PACKAGE = "sklearn"


class DigitImages(ImageSource):
    """1,797 grey images of 8 x 8 pixels; their 17 levels are scaled to 0 .. 255."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classnames: Sequence[str]) -> None:
        self._pixels = np.round(images * (255 / 16)).astype(np.uint8)
        self._labels, self.classnames = labels.tolist(), classnames

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"digits[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), self._labels[index]

    def targets(self) -> Sequence[int]:
        return self._labels


@dataset_type("sklearn_digits")
class Digits(DatasetSpec):
    """`sklearn.datasets.load_digits()`, all of it; labels are the digits."""

    def location(self) -> Path | None:
        return None

    def exists(self) -> bool:
        return importlib.util.find_spec(PACKAGE) is not None

    def open(self) -> DigitImages:
        if not self.exists():
            raise UserError("the package scikit-learn is not installed; install it with `pip install scikit-learn`")
        from sklearn.datasets import load_digits  # optional, and slow to import

        digits = load_digits()
        return DigitImages(digits.images, digits.target, [str(name) for name in digits.target_names])
