"""What `--check` says of datasets that are right, missing, and wrong in different ways."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llip.clipeval.catalog.__main__ import check_catalog, main
from llip.clipeval.catalog.catalog import load_catalog
from llip.errors import EXIT_USER
from tests.clipeval.fakes import write_catalog, write_imagefolder, write_retrieval, write_tar, write_wds

PROMPTS = {"prompts": ["a {c}"]}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_imagefolder(tmp_path / "good", ["ant", "bee"], 2)
    write_wds(tmp_path / "wds", [0, 1, 5], ["ant", "bee"])
    write_retrieval(tmp_path / "pairs", 4)
    write_imagefolder(tmp_path / "broken", ["ant", "bee"], 1)
    (tmp_path / "broken/ant/000.png").write_bytes(b"")
    (tmp_path / "empty/ant").mkdir(parents=True)
    write_imagefolder(tmp_path / "hole", ["ant", "bee"], 1)
    (tmp_path / "hole/cow").mkdir()
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 {c}".encode("latin-1"))
    write_tar(tmp_path / "latin/test/0.tar", {"a.png": b"", "a.txt": "caf\u00e9".encode("latin-1")})
    return tmp_path


def check(folder: Path, **entry: object) -> dict:
    entry = {key: value for key, value in ({"type": "imagefolder"} | PROMPTS | entry).items() if value is not None}
    (finding,) = check_catalog(load_catalog(write_catalog(folder / "catalog.json", {"task": entry})))
    return finding.to_json()


def test_right(folder: Path) -> None:
    found = check(folder, path="good", num_classes=2, num_images=4)
    assert (found["status"], found["problem"]) == ("right", None)
    assert (found["classes"], found["expected_classes"], found["images"], found["expected_images"]) == (2, 2, 4, 4)
    assert found["location"] == str(folder / "good")
    write_catalog(folder / "catalog.json", {"pairs": {"type": "retrieval", "path": "pairs", "num_images": 4}})
    (found,) = check_catalog(load_catalog(folder / "catalog.json"))
    assert (found.status, found.classes, found.images) == ("right", None, 4)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "good", "num_images": 5}, "4 images in .*good, but the entry expects num_images = 5"),
        ({"path": "good", "num_classes": 3}, "2 class names, but the entry expects num_classes = 3"),
        ({"path": "good", "classnames": ["bee", "wasp"]}, "class 0 is called 'bee', the dataset's name of class 1"),
        ({"path": "good", "classnames": ["a", "b"], "class_keys": ["ant", "ant"]}, "class_keys names 'ant' twice"),
        (
            {"path": "good", "classnames": ["a", "b"], "class_keys": ["ant", "cow"]},
            "^classnames has no name for .*'bee'",
        ),
        ({"path": "good", "label_names": ["ant", "bee", "cow"]}, "label_names is for datasets without class names"),
        ({"path": "good", "metric": "top5"}, "metric 'top5' is 1 by definition with 2 classes"),
        ({"path": "good", "prompts": "latin.txt"}, r"prompts file .*latin\.txt is not UTF-8 text"),
        ({"path": "good", "listing": "good"}, "file .*good is a folder"),
        ({"path": "good", "class_pattern": "(a)nt|(b)ee", "numbered": True}, "folder 'ant' .* is not a number"),
        ({"path": "latin", "type": "retrieval", "prompts": None}, r"0\.tar:a: its txt is not UTF-8 text"),
        ({"path": "good", "split": "val"}, "dataset folder val is not in"),
        ({"path": "broken"}, "the first image, .*ant/000.png, cannot be read: UnidentifiedImageError"),
        ({"path": "empty"}, "the dataset is empty"),
        ({"path": "hole"}, r"hole has class folders without images: cow \(1 in all\); .* class_pattern"),
        ({"path": "good", "prompts": "gone.txt"}, r"prompts file .*gone\.txt is not there"),
        ({"path": "wds", "type": "webdataset"}, r"1\.tar:00002 has label 5, but there are 2 class names"),
    ],
)
def test_wrong(folder: Path, entry: dict, words: str) -> None:
    found = check(folder, **entry)
    assert found["status"] == "wrong"
    assert re.search(words, found["problem"]), found["problem"]


def test_a_class_pattern_without_its_group_names_the_folder(folder: Path) -> None:
    assert check(folder, path="good", class_pattern="(a)nt|b.*", classnames=["a", "bee"])["problem"] is None


def test_missing_says_where_from(folder: Path) -> None:
    found = check(folder, path="a/gone", source="https://example.org", download="get -o {path} -C {parent}")
    assert (found["status"], found["problem"], found["images"]) == ("missing", None, None)
    assert found["source"] == "https://example.org"
    assert found["download"] == f"get -o {folder}/a/gone -C {folder}/a"
    assert check(folder, path="gone", prompts="p.txt")["status"] == "missing"
    assert "p.txt is not there" in check(folder, path="gone", prompts="p.txt")["problem"]  # before a long download


def test_a_dataset_that_raises_anything_does_not_end_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("llip.clipeval.dataset_types.folders._images_below", explode)
    entries = {"a": {"type": "imagefolder", "path": "good", **PROMPTS}, "b": {"type": "retrieval", "path": "pairs"}}
    findings = check_catalog(load_catalog(write_catalog(folder / "catalog.json", entries)))
    assert [finding.status for finding in findings] == ["wrong", "right"]
    assert findings[0].problem == "KeyError: 'surprise'"


def test_program(folder: Path, capsys: pytest.CaptureFixture) -> None:
    good = {"type": "imagefolder", "path": "good", "num_images": 4, **PROMPTS}
    gone = {"type": "imagefolder", "path": "gone", "source": "https://example.org", "num_images": 7, **PROMPTS}
    catalog = str(write_catalog(folder / "catalog.json", {"good": good, "gone": gone}))
    assert main(["--check", catalog]) == 0  # a missing dataset is no mistake
    table, missing, counts = capsys.readouterr().out.split("\n\n")
    assert table.splitlines()[2].split() == ["good", "right", "2", "4", "of", "4", "top1", str(folder / "good")]
    assert missing.splitlines()[1].strip() == "gone: https://example.org"
    assert counts.strip() == "1 right, 0 wrong, 1 missing"
    write_catalog(folder / "catalog.json", {"good": good | {"num_images": 5}, "gone": gone})
    assert main(["--check", catalog, "--json"]) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    tasks = json.loads(out)["tasks"]
    assert (tasks["good"]["status"], tasks["good"]["images"], tasks["gone"]["status"]) == ("wrong", 4, "missing")
    assert main(["--check", catalog, "--tasks", "gone"]) == 0
    assert main(["--check", catalog, "--tasks", "goon"]) == EXIT_USER
    assert "error: unknown task 'goon'" in capsys.readouterr().err
    assert main(["--check", str(folder / "no.json")]) == EXIT_USER


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_as_a_module() -> None:
    command = [sys.executable, "-m", "llip.clipeval.catalog", "--check", "--tasks", "cifar10", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert list(json.loads(done.stdout)["tasks"]) == ["cifar10"], done.stderr
