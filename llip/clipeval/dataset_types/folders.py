"""Images as files: one folder per class (imagefolder), or a list of paths beside a list of labels (filelist)."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llip.clipeval.datasets import DatasetSpec, ImageSource, dataset_type, require_file, require_folder
from llip.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


class ImageFiles(ImageSource):
    """Image files with labels."""

    def __init__(self, files: Sequence[str], labels: Sequence[int], classnames: Sequence[str] | None = None) -> None:
        self.files, self.labels, self.classnames = files, labels, classnames

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[index]) as image:
            image.load()
        return image, int(self.labels[index])


@dataset_type("imagefolder")
class ImageFolder(DatasetSpec):
    """`path[/split]/<class>/<image>`: labels follow the sorted folder names, as torchvision's ImageFolder has it."""

    path: Path
    split: str = ""

    def open(self) -> ImageFiles:
        folder = require_folder(self.path / self.split)
        classes = sorted(child.name for child in folder.iterdir() if child.is_dir())
        if not classes:
            raise UserError(f"folder {folder} has no class folders; expected {folder}/<class>/<image>")
        files = [(file, label) for label, name in enumerate(classes) for file in _images_below(folder / name)]
        return ImageFiles([file for file, _ in files], [label for _, label in files], classes)


def _images_below(folder: Path) -> Iterator[str]:
    # os.walk, not torchvision's make_dataset: importing torchvision costs every evaluating process seconds
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (os.path.join(parent, file) for file in sorted(files) if Path(file).suffix.lower() in IMAGE_SUFFIXES)


@dataset_type("filelist")
class FileList(DatasetSpec):
    """Two .npy files: `images`, paths as strings (relative to `path`), and `labels`, integers, one for each."""

    path: Path
    images: Path
    labels: Path

    def open(self) -> ImageFiles:
        root = require_folder(self.path)
        files, labels = _read_npy(self.images, "U", "strings"), _read_npy(self.labels, "iu", "integers")
        if len(files) != len(labels):
            raise UserError(f"{self.images} has {len(files)} images and {self.labels} has {len(labels)} labels")
        return ImageFiles([str(root / file) for file in files.tolist()], labels.tolist())


def _read_npy(path: Path, kinds: str, meaning: str) -> np.ndarray:
    try:
        array = np.load(require_file(path), allow_pickle=False)
    except ValueError as error:
        fix = f"write it with np.save(path, np.array(values)) from plain {meaning} (object arrays hold pickles)"
        raise UserError(f"{path} cannot be read without unpickling: {error}; {fix}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or (len(array) and array.dtype.kind not in kinds):
        described = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{path} holds {described}; expected one dimension of {meaning}")
    return array
