"""Any labelled dataset of `torchvision.datasets`, by the name of its class. Nothing is ever downloaded here."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from PIL import Image

from llip.clipeval.datasets import DatasetSpec, ImageSource, dataset_type, require_folder
from llip.errors import UserError, did_you_mean


class TorchvisionImages(ImageSource):
    """A torchvision dataset whose samples are (PIL image, label)."""

    def __init__(self, dataset: Any, label: str) -> None:
        self.dataset, self.label = dataset, label
        names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        self.classnames = [_readable(str(name)) for name in names] if names is not None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        if label is None:
            raise ValueError("the dataset has no label for this image")
        return image, int(label)


def _readable(name: str) -> str:
    return re.sub(r"[_/]+", " ", name).strip()


@dataset_type("torchvision")
class Torchvision(DatasetSpec):
    """`torchvision.datasets.<dataset>(root=path, download=False, **kwargs)`."""

    path: Path
    dataset: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> TorchvisionImages:
        from torchvision import datasets

        if self.dataset not in datasets.__all__:
            raise UserError(
                f"torchvision has no dataset {self.dataset!r}.{did_you_mean(self.dataset, datasets.__all__)}"
            )
        constructor, kwargs = getattr(datasets, self.dataset), dict(self.kwargs)
        parameters = inspect.signature(constructor).parameters
        for name in kwargs:
            if name not in parameters:
                raise UserError(f"torchvision's {self.dataset} takes no {name!r}.{did_you_mean(name, parameters)}")
        if "download" in parameters:
            kwargs["download"] = False
        require_folder(self.path)
        try:
            return TorchvisionImages(constructor(root=self.path, **kwargs), self.dataset)
        except (RuntimeError, OSError, ModuleNotFoundError, ValueError) as error:
            reason = str(error).replace(" You can use download=True to download it", "").rstrip(". ")
            fix = f"; fetch it once with torchvision.datasets.{self.dataset}({str(self.path)!r}, download=True)"
            if "download" not in parameters or "install" in reason:  # a missing package is not mended by a download
                fix = ""
            raise UserError(f"torchvision's {self.dataset} cannot be opened in {self.path}: {reason}{fix}") from error
