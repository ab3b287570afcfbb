"""The interface of evaluation datasets, and the registry of their types.

A type is one frozen dataclass in one file of `dataset_types/`: its fields are those of a catalog entry (their
annotations make the JSON Schema), `open()` finds the data. All sources are indexed, tar shards too (their headers are
scanned once), so that process r of W takes exactly images r, r + W, ... and every count is known before scoring.
"""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from llip.clipeval.metrics import CLASSIFICATION
from llip.errors import UserError, nearest
from llip.system.paths import unset_variables


class ImageSource(ABC):
    """Images by index with their targets; opened by each process, read by data workers.

    Attributes:
        classnames: the dataset's class names in the order of the labels, None if it has none.
        templates: the dataset's prompts, None if it has none.
        multi_label: an image may be of several classes.
    """

    classnames: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    multi_label: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return how messages call image `index`: mostly its path."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, Any]:
        """Return the image and its target.

        The target is the label (int), the labels (tuple of int) where the source is `multi_label`, or in retrieval the
        image's captions (tuple of str).

        Raises:
            Exception: of any kind, for an image that cannot be read; the caller counts and names it.
        """

    def targets(self) -> Sequence[Any] | None:
        """Return the targets of all images, or None if an image must be read to know its target."""
        return None


class DatasetSpec(ABC):
    """Base of the dataset types: subclasses are frozen dataclasses, registered with `dataset_type`."""

    kind: ClassVar[str] = CLASSIFICATION
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of the subclasses
    path: Path  # of those that do not define `location`

    def location(self) -> Path | None:
        """Return the folder or file without which the dataset is missing rather than damaged, if it needs one."""
        return self.path

    def exists(self) -> bool:
        """Return whether anything of the dataset is on this machine."""
        location = self.location()
        return location is None or location.exists()

    @abstractmethod
    def open(self) -> ImageSource:
        """Find the dataset's files.

        Raises:
            UserError: missing or malformed data; the message names the path and the fix.
        """


DATASET_TYPES: dict[str, type[DatasetSpec]] = {}


def dataset_type(name: str) -> Callable[[type[DatasetSpec]], type[DatasetSpec]]:
    """Register a frozen dataclass as the catalog's dataset type `name`."""

    def register(spec: type[DatasetSpec]) -> type[DatasetSpec]:
        assert name not in DATASET_TYPES, f"two dataset types are called {name}"
        DATASET_TYPES[name] = dataclasses.dataclass(frozen=True)(spec)
        return DATASET_TYPES[name]

    return register


def load_dataset_types() -> dict[str, type[DatasetSpec]]:
    """Import every file of `dataset_types/` and return the registry."""
    package = importlib.import_module("llip.clipeval.dataset_types")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return DATASET_TYPES


def readable_name(name: str, camel_case: bool = False) -> str:
    """Return a class folder's name as words: `_` becomes a space, with camel_case `aB` becomes `a B`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name) if camel_case else name
    return re.sub(r"[\s_]+", " ", spaced).strip()


def files_below(folder: Path) -> Iterator[str]:
    """Yield the files below a folder by name, links followed; each real folder is visited once, so loops end."""
    # os.walk, not torchvision's make_dataset: importing torchvision costs every evaluating process seconds
    real_folder = Path(os.path.realpath(folder))
    visited = {str(path) for path in (real_folder, *real_folder.parents)}  # a link to a parent leads to other classes
    for parent, folders, files in os.walk(folder, followlinks=True):
        links_last = sorted(folders, key=lambda name: os.path.islink(os.path.join(parent, name)))
        folders.clear()
        for name in links_last:
            if (real := os.path.realpath(os.path.join(parent, name))) not in visited:
                visited.add(real)
                folders.append(name)
        folders.sort()
        yield from (os.path.join(parent, file) for file in sorted(files))


def require_folder(path: Path) -> Path:
    """Return `path` if it is a folder, else raise a `UserError` that names what is there instead."""
    if path.is_dir():
        return path
    if unset := unset_variables(path):
        raise UserError(f"dataset folder {path} is not there: the environment variable {unset[0]} is not set")
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"dataset folder {path} is not there (nor is {parent})")
    siblings = sorted(child.name for child in parent.iterdir() if child.is_dir())
    close = nearest(path.name, siblings)
    hint = f"nearest: {', '.join(close)}" if close else f"it holds {', '.join(siblings[:8]) or 'no folders'}"
    raise UserError(f"dataset folder {path.name} is not in {parent} ({hint})")


def require_file(path: Path, what: str = "file") -> Path:
    """Return `path` if it is a file, else raise a `UserError`; `what` it is in words."""
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder")
    if not path.is_file():
        require_folder(path.parent)
        close = nearest(path.name, [child.name for child in path.parent.iterdir()])
        raise UserError(f"{what} {path} is not there" + (f"; the folder has {', '.join(close)}" if close else ""))
    return path


def read_text(path: Path, what: str = "file") -> str:
    """Return the text of a file or raise a `UserError`; `what` it is in words."""
    try:
        return require_file(path, what).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text: {error}") from error


def read_json(path: Path, what: str = "file") -> Any:
    """Return the content of a JSON file or raise a `UserError`; `what` it is in words."""
    try:
        return json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from error
