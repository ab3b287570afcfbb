"""Retrieval from COCO's captions and from Karpathy's splits."""

import json
from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from tests.clipeval.fakes import (
    FakeModel,
    captions_of,
    evaluate,
    picture,
    png,
    write_catalog,
    write_retrieval,
)


def open_entry(folder: Path, kind: str, stored: object, **fields: object) -> ImageSource:
    (folder / "notes.json").write_text(json.dumps(stored))
    entry = {"type": kind, "path": "images", "annotations": "notes.json", **fields}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images/val2014").mkdir(parents=True)
    for index in range(3):
        (tmp_path / f"images/{index}.jpg").write_bytes(png(picture(index)))
        (tmp_path / f"images/val2014/{index}.jpg").write_bytes(png(picture(index)))
    return tmp_path


COCO = {
    "images": [{"id": 71, "file_name": "1.jpg"}, {"id": 5, "file_name": "0.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "a cat "},
        {"id": 2, "image_id": 71, "caption": "a dog\nin the sun"},
        {"id": 3, "image_id": 5, "caption": "one cat"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "2.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "x"}, {"raw": "y"}]},
        {"filename": "0.jpg", "filepath": "val2014", "split": "restval", "sentences": [{"raw": "z"}]},
        {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "w"}]},
    ]
}


def check(source: ImageSource, expected: list[tuple[int, tuple[str, ...]]]) -> None:
    assert list(source.targets()) == [captions for _, captions in expected]
    for index, (number, captions) in enumerate(expected):
        image, target = source.load(index)
        assert np.array_equal(np.asarray(image), np.asarray(picture(number)))
        assert target == captions


def test_coco(folder: Path) -> None:
    check(open_entry(folder, "coco_captions", COCO), [(1, ("a dog in the sun",)), (0, ("a cat", "one cat"))])


def test_karpathy(folder: Path) -> None:
    check(open_entry(folder, "karpathy", KARPATHY), [(2, ("x", "y")), (1, ("w",))])
    check(open_entry(folder, "karpathy", KARPATHY, split="restval"), [(0, ("z",))])


@pytest.mark.parametrize(
    ("kind", "stored", "fields", "words"),
    [
        ("coco_captions", [], {}, "no list 'images'; expected an object with images and annotations"),
        ("coco_captions", {"images": []}, {}, "no list 'annotations'"),
        ("coco_captions", {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": []}, {}, "no caption for image"),
        ("coco_captions", {"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}, {}, "KeyError: 1"),
        ("karpathy", KARPATHY, {"split": "tset"}, "no split 'tset'; it has restval, test"),
        ("karpathy", {"images": [{"split": "test"}]}, {}, "not in the layout of its dataset type"),
    ],
)
def test_mistakes(folder: Path, kind: str, stored: object, fields: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_entry(folder, kind, stored, **fields)


def test_not_json(folder: Path) -> None:
    (folder / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is not JSON"):
        open_entry(folder, "karpathy", {}, annotations="x.json")
    with pytest.raises(UserError, match=r"file .*gone\.json is not there"):
        open_entry(folder, "karpathy", {}, annotations="gone.json")


def test_files_and_shards_with_the_same_pairs_give_the_same_recalls(tmp_path: Path) -> None:
    write_retrieval(tmp_path / "shards", 12)
    (tmp_path / "images").mkdir()
    images, notes = [], []
    for index in range(12):
        (tmp_path / f"images/{index}.jpg").write_bytes(png(picture(index)))
        images.append({"id": 100 - index, "file_name": f"{index}.jpg"})
        notes += [{"image_id": 100 - index, "caption": caption} for caption in captions_of(index)]
    (tmp_path / "notes.json").write_text(json.dumps({"images": images, "annotations": notes}))
    entries = {
        "shards": {"type": "retrieval", "path": "shards"},
        "files": {"type": "coco_captions", "path": "images", "annotations": "notes.json"},
    }
    shards, files = evaluate(FakeModel(), write_catalog(tmp_path / "catalog.json", entries))
    assert (shards.error, files.error) == (None, None)
    assert (files.n, files.texts) == (12, len(notes))
    assert files.values == shards.values
