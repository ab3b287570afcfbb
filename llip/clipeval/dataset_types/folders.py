"""Images as files, one folder per class."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llip.clipeval.datasets import (
    DatasetSpec,
    ImageSource,
    dataset_type,
    files_below,
    read_json,
    read_text,
    readable_name,
    require_folder,
)
from llip.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


class ImageFiles(ImageSource):
    """Image files, each with a target (a label, or captions); `border` pixels are cropped from every side."""

    def __init__(
        self, files: Sequence[str], targets: Sequence[Any], classnames: Sequence[str] | None = None, border: int = 0
    ) -> None:
        self._files, self._targets, self.classnames, self._border = files, targets, classnames, border

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def load(self, index: int) -> tuple[Image.Image, Any]:
        with Image.open(self._files[index]) as file:
            file.load()
        image: Image.Image = file
        if self._border:
            image = image.crop((self._border, self._border, image.width - self._border, image.height - self._border))
        return image, self._targets[index]

    def targets(self) -> Sequence[Any]:
        return self._targets


@dataset_type("imagefolder")
class ImageFolder(DatasetSpec):
    """`path[/split]/<class>/<image>`; labels follow the sorted folder names, as torchvision's ImageFolder has it.

    Attributes:
        listing: a text file of image paths below the folder, one per line: only these images, in this order; the
            class is the image's folder, which may then be nested.
        class_pattern: regular expression that the full name of a class folder matches; its first group, if any, is
            the class's name.
        numbered: folders are numbers, labels follow their values (2 before 10).
        camel_case: folder names are words joined LikeThis.
        names: a json object of folder -> the dataset's name of the class.
        only: a json list, or an object, of the (mapped) names of the classes to use.
        crop_border: pixels to crop from each side of every image.
    """

    path: Path
    split: str = ""
    listing: Path | None = None
    class_pattern: str = "(.+)"
    numbered: bool = False
    camel_case: bool = False
    names: Path | None = None
    only: Path | None = None
    crop_border: int = 0

    def open(self) -> ImageFiles:
        root = require_folder(self.path / self.split)
        listed = None if self.listing is None else _read_listing(self.listing)
        folders = {child.name for child in root.iterdir() if child.is_dir()}
        names = self._class_names(folders if listed is None else {file.rpartition("/")[0] for file in listed})
        if not names:
            where = f"folder {root} has no class folders" if listed is None else f"{self.listing} lists no class"
            raise UserError(f"{where} that match class_pattern {self.class_pattern!r}; expected {root}/<class>/<image>")
        order = sorted(names, key=int) if self.numbered else sorted(names)
        label_of = {folder: label for label, folder in enumerate(order)}
        if listed is None:
            files = [(file, label) for folder, label in label_of.items() for file in _images_below(root / folder)]
            present = {label for _, label in files}
            if files and (empty := [folder for folder in order if label_of[folder] not in present]):
                raise UserError(
                    f"{root} has class folders without images: {', '.join(empty[:5])} ({len(empty)} in all); "
                    "remove them, or name the classes with class_pattern"
                )
        else:
            pairs = [(file, file.rpartition("/")[0]) for file in listed]
            files = [(str(root / file), label_of[folder]) for file, folder in pairs if folder in label_of]
        paths, labels = [file for file, _ in files], [label for _, label in files]
        return ImageFiles(paths, labels, [names[folder] for folder in order], self.crop_border)

    def _class_names(self, folders: set[str]) -> dict[str, str]:
        """Return folder -> class name for the folders that are classes."""
        try:
            pattern = re.compile(self.class_pattern)
        except re.error as error:
            raise UserError(f"class_pattern {self.class_pattern!r} is not a regular expression: {error}") from error
        matches = {folder: match for folder in folders if (match := pattern.fullmatch(folder))}
        if self.numbered and (wrong := sorted(folder for folder in matches if not re.fullmatch(r"\d+", folder))):
            raise UserError(f"folder {wrong[0]!r} in {self.path / self.split} is not a number, but numbered = true")
        names = {
            folder: readable_name(((pattern.groups and match[1]) or folder).replace("/", " "), self.camel_case)
            for folder, match in matches.items()
        }
        if self.names is not None:
            mapping = _read_names(self.names, dict)
            names = {folder: str(mapping[folder]) for folder in names if folder in mapping}
        if self.only is not None:
            kept = set(_read_names(self.only, (dict, list)))
            names = {folder: name for folder, name in names.items() if name in kept}
            if missing := sorted(kept - set(names.values())):
                raise UserError(f"{self.only} lists class {missing[0]!r}, which {self.path / self.split} lacks")
        return names


def _images_below(folder: Path) -> Iterator[str]:
    return (file for file in files_below(folder) if Path(file).suffix.lower() in IMAGE_SUFFIXES)


def _read_listing(path: Path) -> list[str]:
    lines = read_text(path).splitlines()
    files = [line.strip().lstrip("/") for line in lines if line.strip()]
    for file in files:
        if "/" not in file or ".." in file.split("/"):
            raise UserError(f"{path} lists {file!r}; expected <class>/<image>, below the dataset's folder")
    return files


def _read_names(path: Path, kinds: type | tuple[type, ...]) -> Any:
    value = read_json(path)
    if not isinstance(value, kinds):
        raise UserError(f"{path} holds {type(value).__name__}; expected an object of names")
    return value
