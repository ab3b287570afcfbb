"""Each on-disk format, written small and read back through a catalog; and what is said about broken ones."""

from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.datasets import ImageSource
from llip.clipeval.loading import image_batches
from llip.errors import UserError
from tests.clipeval.fakes import (
    captions_of,
    picture,
    png,
    preprocess,
    write_catalog,
    write_imagefolder,
    write_retrieval,
    write_tar,
    write_wds,
)

CLASSES = ["ant", "bee", "cow"]


def open_entry(folder: Path, **entry: object) -> ImageSource:
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


def check_pictures(source: ImageSource, targets: list) -> None:
    assert len(source) == len(targets)
    for i, target in enumerate(targets):
        image, found = source.load(i)
        assert np.array_equal(np.asarray(image), np.asarray(picture(i)))
        assert found == target


def test_imagefolder(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "set/val", CLASSES, 2)
    (tmp_path / "set/val/ant/notes.txt").write_text("not an image")
    source = open_entry(tmp_path, type="imagefolder", path="set", split="val")
    assert source.classnames == CLASSES
    check_pictures(source, [0, 0, 1, 1, 2, 2])


def test_filelist(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / f"images/{i}.png")
    np.save(tmp_path / "x.npy", np.array(["0.png", "1.png", "2.png"]))
    np.save(tmp_path / "y.npy", np.array([1, 0, 1]))
    entry = {"type": "filelist", "path": "images", "images": "x.npy", "labels": "y.npy"}
    check_pictures(open_entry(tmp_path, **entry), [1, 0, 1])
    np.save(tmp_path / "y.npy", np.array([1, 0]))
    with pytest.raises(UserError, match=r"3 images and .* 2 labels"):
        open_entry(tmp_path, **entry)
    np.save(tmp_path / "y.npy", np.array([1.0, 0.0, 1.0]))
    with pytest.raises(UserError, match=r"float64.*integers"):
        open_entry(tmp_path, **entry)
    np.save(tmp_path / "x.npy", np.array(["0.png", "1.png", "2.png"], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="without unpickling"):
        open_entry(tmp_path, **entry)


def test_torchvision(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "eurosat/2750", ["Sea_Lake", "River"], 2)
    source = open_entry(tmp_path, type="torchvision", path=".", dataset="EuroSAT")
    assert source.classnames == ["River", "Sea Lake"]
    check_pictures(source, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "EuroSat"}, "no dataset 'EuroSat'.*'EuroSAT'"),
        ({"kwargs": {"spilt": "test"}, "dataset": "DTD"}, "DTD takes no 'spilt'.*'split'"),
        ({"kwargs": {"split": "exam"}, "dataset": "DTD"}, "DTD cannot be opened.*exam"),
        ({}, "EuroSAT cannot be opened in .*download=True"),
        ({"path": "nowhere"}, "dataset folder nowhere is not in"),
    ],
)
def test_torchvision_mistakes(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_entry(tmp_path, **({"type": "torchvision", "path": ".", "dataset": "EuroSAT"} | changes))


def test_webdataset(tmp_path: Path) -> None:
    labels = [i % 3 for i in range(13)]
    write_wds(tmp_path / "wds", labels, CLASSES, shards=12)  # 10.tar must follow 9.tar
    source = open_entry(tmp_path, type="webdataset", path="wds")
    assert source.classnames == CLASSES
    assert source.templates == ["a photo of {c}", "the {c}"]
    check_pictures(source, labels)


def test_webdataset_mistakes(tmp_path: Path) -> None:
    entry = {"type": "webdataset", "path": "wds"}
    write_wds(tmp_path / "wds", [0, 1, 2], CLASSES, shards=2)
    test = tmp_path / "wds/test"
    (test / "nshards.txt").write_text("3")
    with pytest.raises(UserError, match=r"nshards.txt has '3', but .* has 2"):
        open_entry(tmp_path, **entry)
    (test / "nshards.txt").unlink()
    (test / "1.tar").write_bytes(b"not a tar, not at all" * 100)
    with pytest.raises(UserError, match=r"1\.tar cannot be read"):
        open_entry(tmp_path, **entry)
    write_tar(test / "1.tar", {"a.png": png(picture(0)), "a.txt": "hello"})
    with pytest.raises(UserError, match=r"1\.tar:a has no 'cls'; its keys are png, txt"):
        open_entry(tmp_path, **entry)
    write_tar(test / "1.tar", {"a.png": png(picture(0)), "a.cls": "cat"})
    with pytest.raises(UserError, match="cls is 'cat', expected a class number"):
        open_entry(tmp_path, **entry)
    (test / "0.tar").unlink()
    write_tar(test / "1.tar", {"a.tiff": b"", "a.cls": "0"})
    with pytest.raises(UserError, match="keys found: cls, tiff"):
        open_entry(tmp_path, **entry)
    (test / "1.tar").unlink()
    with pytest.raises(UserError, match=r"no shard \*\.tar"):
        open_entry(tmp_path, **entry)
    with pytest.raises(UserError, match=r"dataset folder tset is not in .*nearest: test"):
        open_entry(tmp_path, **entry, split="tset")


@pytest.mark.parametrize("caption_key", ["txt", "json.captions"])
def test_retrieval(tmp_path: Path, caption_key: str) -> None:
    write_retrieval(tmp_path / "set", 5)
    source = open_entry(tmp_path, type="retrieval", path="set", caption_key=caption_key)
    check_pictures(source, [tuple(captions_of(i)) for i in range(5)])
    (tmp_path / "set/test/1.tar").unlink()
    one_tar = open_entry(tmp_path, type="retrieval", path="set", split="test/0.tar", caption_key=caption_key)
    pattern = open_entry(tmp_path, type="retrieval", path="set", split="test/?.tar", caption_key=caption_key)
    assert len(one_tar) == len(pattern) == 3


@pytest.mark.parametrize(
    ("caption_key", "words"),
    [
        ("json.title", None),
        ("json.caption", "no field 'caption' in its json"),
        ("json.bad", "json.bad is 3, expected strings"),
        ("text", "has no 'text'; its keys are json, png, txt"),
    ],
)
def test_retrieval_captions(tmp_path: Path, caption_key: str, words: str | None) -> None:
    write_retrieval(tmp_path / "set", 2)
    entry = {"type": "retrieval", "path": "set", "caption_key": caption_key}
    if words is None:
        assert open_entry(tmp_path, **entry).load(1)[1] == (captions_of(1)[0],)
        return
    with pytest.raises(UserError, match=words):
        open_entry(tmp_path, **entry)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_asked_images_once_and_name_the_unreadable(tmp_path: Path, workers: int) -> None:
    write_imagefolder(tmp_path / "set", CLASSES, 4)
    (tmp_path / "set/bee/001.png").write_bytes(b"broken")
    source = open_entry(tmp_path, type="imagefolder", path="set")
    seen, bad = [], []
    for rank in range(2):
        for batch in image_batches(source, preprocess, range(rank, 12, 2), batch_size=4, workers=workers):
            assert batch.images.shape[0] == len(batch.indices) == len(batch.targets)
            seen += zip(batch.indices, batch.targets, strict=True)
            bad += batch.unreadable
    assert sorted(seen) == [(i, i // 4) for i in range(12) if i != 5]
    assert [(item.index, item.name) for item in bad] == [(5, str(tmp_path / "set/bee/001.png"))]
