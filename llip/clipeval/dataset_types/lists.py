"""Image files with their labels in another file: .npy pairs (filelist) or a JSON object per line (jsonl)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llip.clipeval.dataset_types.folders import ImageFiles
from llip.clipeval.datasets import DatasetSpec, dataset_type, read_text, require_file, require_folder
from llip.errors import UserError


@dataset_type("filelist")
class FileList(DatasetSpec):
    """Two .npy files: `images`, paths as strings (relative to `path`), and `labels`, integers."""

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
    except (ValueError, EOFError) as error:
        fix = f"write it with np.save(path, np.array(values)) from plain {meaning} (object arrays hold pickles)"
        raise UserError(f"{path} cannot be read without unpickling: {error}; {fix}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or (len(array) and array.dtype.kind not in kinds):
        described = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{path} holds {described}; expected one dimension of {meaning}")
    return array


@dataset_type("jsonl")
class JsonLines(DatasetSpec):
    """`file`, one JSON object per line: the image's path (relative to `path`) and its label, an integer from 0."""

    path: Path
    file: Path
    image_key: str = "img"
    label_key: str = "label"

    def open(self) -> ImageFiles:
        root = require_folder(self.path)
        files, labels = [], []
        for number, line in enumerate(read_text(self.file).splitlines(), start=1):
            if line.strip():
                image, label = self._parse(line, f"{self.file}, line {number}")
                files.append(str(root / image))
                labels.append(label)
        return ImageFiles(files, labels)

    def _parse(self, line: str, where: str) -> tuple[str, int]:
        try:
            item: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        for key, kind, expected in ((self.image_key, str, "a path"), (self.label_key, int, "a class number from 0")):
            if not isinstance(item, dict) or key not in item:
                raise UserError(f"{where} has no {key!r}: {line[:60]!r}")
            if not isinstance(item[key], kind) or isinstance(item[key], bool):
                raise UserError(f"{where}: {key} = {item[key]!r:.40}; expected {expected}")
        return item[self.image_key], item[self.label_key]
