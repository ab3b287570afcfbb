"""Evaluation shards that are damaged, and labels that are vectors (whole layouts are in test_datasets.py)."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from tests.clipeval.fakes import picture, png, write_catalog, write_tar, write_wds


def open_entry(folder: Path, **fields: object) -> ImageSource:
    entry = {"type": "webdataset", "path": "wds", **fields}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


def npy(values: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, **options), allow_pickle=True)
    return buffer.getvalue()


def test_a_vector_of_labels(tmp_path: Path) -> None:
    members = {}
    for index, vector in enumerate([[0, 1, 1], [0, 0, 0], [1, 0, 0]]):
        members |= {f"{index}.png": png(picture(index)), f"{index}.npy": npy(vector)}
    write_tar(tmp_path / "wds/test/0.tar", members)
    source = open_entry(tmp_path, label_key="npy")
    assert source.multi_label
    assert list(source.targets()) == [(1, 2), (), (0,)]
    with pytest.raises(UserError, match="has no 'cls'"):
        open_entry(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy([0, 2]), "expected a vector of zeros and ones"),
        (npy([[0, 1]]), r"of shape \(1, 2\)"),
        (npy([0, None], dtype=object), "without unpickling"),
        (pickle.dumps([1, 0]), "without unpickling"),
        (b"", "without unpickling"),
    ],
)
def test_vectors_that_are_none(tmp_path: Path, data: bytes, words: str) -> None:
    write_tar(tmp_path / "wds/test/0.tar", {"0.png": png(picture(0)), "0.npy": data})
    with pytest.raises(UserError, match=words):
        open_entry(tmp_path, label_key="npy")


@pytest.mark.parametrize("damage", ["header", "cut in data", "cut in header", "empty", "no end"])
def test_damage_never_drops_samples_silently(tmp_path: Path, damage: str) -> None:
    write_wds(tmp_path / "wds", [i % 2 for i in range(6)], ["ant", "bee"], shards=1)
    shard = tmp_path / "wds/test/0.tar"
    whole = shard.read_bytes()
    header = whole.index(b"00003.png")  # a header starts with the name
    if damage == "header":
        shard.write_bytes(whole[:header] + b"\xff" * 512 + whole[header + 512 :])
    elif damage == "cut in data":
        shard.write_bytes(whole[: header + 600])
    elif damage == "cut in header":
        shard.write_bytes(whole[: header + 100])
    elif damage == "empty":
        shard.write_bytes(b"")
    else:  # an archive without its closing zeros lacks nothing
        shard.write_bytes(whole.rstrip(b"\0") + b"\0" * (-len(whole.rstrip(b"\0")) % 512))
        assert len(open_entry(tmp_path)) == 6
        return
    with pytest.raises(UserError, match=r"shard .*0\.tar (is damaged at byte \d+|cannot be read)"):
        open_entry(tmp_path)
