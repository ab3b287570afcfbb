"""Retrieval from image files and a json of captions: COCO's layout and Karpathy's splits.

coco_captions   {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
karpathy        {"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}]}]}
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from llip.clipeval.dataset_types.folders import ImageFiles
from llip.clipeval.datasets import DatasetSpec, dataset_type, read_json, require_folder
from llip.clipeval.metrics import RETRIEVAL
from llip.errors import UserError


@dataset_type("coco_captions")
class CocoCaptions(DatasetSpec):
    """Images in `path`, captions in `annotations` (captions_val2017.json and its like); images in the file's order."""

    path: Path
    annotations: Path
    kind: ClassVar[str] = RETRIEVAL

    def open(self) -> ImageFiles:
        root = require_folder(self.path)
        stored = _read(self.annotations, "images", "annotations")
        try:
            captions: dict[Any, list[str]] = {item["id"]: [] for item in stored["images"]}
            for note in stored["annotations"]:
                captions[note["image_id"]].append(note["caption"])
            pairs = [(item["file_name"], captions[item["id"]]) for item in stored["images"]]
        except (KeyError, TypeError) as error:
            raise _malformed(self.annotations, error) from error
        return _images(root, pairs, self.annotations)


@dataset_type("karpathy")
class Karpathy(DatasetSpec):
    """Images below `path`, captions of one `split` in `annotations` (dataset_coco.json, dataset_flickr30k.json)."""

    path: Path
    annotations: Path
    split: str = "test"
    kind: ClassVar[str] = RETRIEVAL

    def open(self) -> ImageFiles:
        root = require_folder(self.path)
        stored = _read(self.annotations, "images")
        try:
            splits = sorted({item["split"] for item in stored["images"]})
            pairs = [
                (
                    f"{item.get('filepath', '')}/{item['filename']}".lstrip("/"),
                    [sentence["raw"] for sentence in item["sentences"]],
                )
                for item in stored["images"]
                if item["split"] == self.split
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise _malformed(self.annotations, error) from error
        if not pairs:
            raise UserError(f"{self.annotations} has no split {self.split!r}; it has {', '.join(splits) or 'none'}")
        return _images(root, pairs, self.annotations)


def _read(path: Path, *lists: str) -> dict[str, Any]:
    stored = read_json(path)
    for name in lists:
        if not isinstance(stored, dict) or not isinstance(stored.get(name), list):
            raise UserError(f"{path} has no list {name!r}; expected an object with {' and '.join(lists)}")
    return stored


def _malformed(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not in the layout of its dataset type ({type(error).__name__}: {error})")


def _images(root: Path, pairs: Iterable[tuple[str, list[str]]], annotations: Path) -> ImageFiles:
    files, captions = [], []
    for file, texts in pairs:
        captions.append(tuple(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()))
        if not captions[-1]:
            raise UserError(f"{annotations} has no caption for image {file}")
        files.append(str(root / file))
    return ImageFiles(files, captions)
