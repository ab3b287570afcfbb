"""Any labelled dataset of `torchvision.datasets`, by the name of its class. Nothing is downloaded."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from PIL import Image

from llip.clipeval.datasets import DatasetSpec, ImageSource, dataset_type, readable_name, require_folder
from llip.clipeval.targets import class_rule
from llip.errors import UserError, did_you_mean


class TorchvisionImages(ImageSource):
    """A torchvision dataset whose samples are (PIL image, annotation)."""

    def __init__(self, dataset: Any, label: str, class_of: Callable[[Any], int]) -> None:
        self.dataset, self.label, self.class_of = dataset, label, class_of
        self._files = _files(dataset)
        # Kitti is in the order of the disk; by name, image i is the same on every machine
        self._order = sorted(range(len(dataset)), key=self._files.__getitem__) if self._files else range(len(dataset))
        names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        self.classnames = [readable_name(str(name)) for name in names] if names is not None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self._files[self._order[index]] if self._files else f"{self.label}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, value = self.dataset[self._order[index]]
        return image, self.class_of(value)


def _files(dataset: Any) -> list[str] | None:
    """Return the paths of the images if the dataset has them in a public attribute."""
    files = getattr(dataset, "images", None) or [sample[0] for sample in getattr(dataset, "samples", ())]
    if len(files) != len(dataset) or not all(isinstance(file, str | Path) for file in files):
        return None
    return [str(file) for file in files]


@dataset_type("torchvision")
class Torchvision(DatasetSpec):
    """`torchvision.datasets.<dataset>(root=path, download=False, **kwargs)`.

    Attributes:
        folder: the dataset's folder below `path`; without it the dataset is missing, not damaged.
        label: how an annotation becomes a class number, see `llip.clipeval.targets`.
    """

    path: Path
    dataset: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    label: Mapping[str, Any] = field(default_factory=dict)

    def location(self) -> Path:
        return self.path / self.folder

    def open(self) -> TorchvisionImages:
        from torchvision import datasets

        if self.dataset not in datasets.__all__:
            raise UserError(
                f"torchvision has no dataset {self.dataset!r}.{did_you_mean(self.dataset, datasets.__all__)}"
            )
        constructor, kwargs = getattr(datasets, self.dataset), dict(self.kwargs)
        parameters = inspect.signature(constructor).parameters
        for name in kwargs:
            if name not in parameters or name in ("root", "download"):
                raise UserError(f"torchvision's {self.dataset} takes no {name!r}.{did_you_mean(name, parameters)}")
        if "download" in parameters:
            kwargs["download"] = False
        class_of = class_rule(self.label)
        require_folder(self.path)
        try:
            return TorchvisionImages(constructor(root=self.path, **kwargs), self.dataset, class_of)
        except Exception as error:  # of any kind: these readers trust their files
            raise UserError(self._problem(error, "download" in parameters)) from error

    def _problem(self, error: Exception, downloads: bool) -> str:
        reason = str(error).replace(" You can use download=True to download it", "").rstrip(". ")
        if isinstance(error, ModuleNotFoundError):
            fix = f"; install it with `pip install {(error.name or '').partition('.')[0]}`"
        elif downloads and "install" not in reason:  # a missing package is not mended by a download
            fix = f"; fetch it once with torchvision.datasets.{self.dataset}({str(self.path)!r}, download=True)"
        else:
            fix = ""
        return f"torchvision's {self.dataset} cannot be opened in {self.path}: {reason}{fix}"
