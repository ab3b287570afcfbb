"""Labels as JSON lines (.npy lists are in test_datasets.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from tests.clipeval.fakes import picture, png, write_catalog


def open_lines(folder: Path, *lines: str, **fields: object) -> ImageSource:
    (folder / "set/img").mkdir(parents=True, exist_ok=True)
    for index in range(2):
        (folder / f"set/img/{index}.png").write_bytes(png(picture(index)))
    (folder / "set/dev.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"type": "jsonl", "path": "set", "file": "set/dev.jsonl", **fields}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


def test_read(tmp_path: Path) -> None:
    lines = [json.dumps({"id": 1, "img": f"img/{i}.png", "label": 1 - i, "text": "x"}) for i in range(2)]
    source = open_lines(tmp_path, lines[0], "", lines[1])
    assert source.targets() == [1, 0]
    for index in range(2):
        assert np.array_equal(np.asarray(source.load(index)[0]), np.asarray(picture(index)))
    assert len(open_lines(tmp_path, '{"file": "img/0.png", "y": 3}', image_key="file", label_key="y")) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"dev.jsonl, line 2 is not JSON"),
        ('{"img": "a"}', r"line 2 has no 'label'"),
        ('{"label": 1}', r"line 2 has no 'img'"),
        ("[]", r"line 2 has no 'img'"),
        ('{"img": "a", "label": "1"}', r"line 2: label = '1'; expected a class number"),
        ('{"img": "a", "label": true}', r"line 2: label = True"),
        ('{"img": 3, "label": 1}', r"line 2: img = 3; expected a path"),
    ],
)
def test_mistakes(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_lines(tmp_path, '{"img": "img/0.png", "label": 0}', line)


def test_hateful_memes_of_the_shipped_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    (tmp_path / "hateful_memes").mkdir()
    (tmp_path / "hateful_memes/dev.jsonl").write_text('{"id": 8291, "img": "img/08291.png", "label": 1, "text": "a"}')
    source = load_catalog()["hateful_memes"].data.open()
    assert (source.targets(), source.name(0)) == ([1], str(tmp_path / "hateful_memes/img/08291.png"))
