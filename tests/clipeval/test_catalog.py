"""The catalog: what it accepts, what it says about mistakes, and the one that is shipped."""

from pathlib import Path

import pytest

from llip.clipeval.catalog import CATALOG_FOLDER, load_catalog
from llip.clipeval.labels import TextSource, resolve_labels
from llip.errors import UserError
from tests.clipeval.fakes import write_catalog

GOOD = {"type": "imagefolder", "path": "images", "prompts": ["a {c}"]}


def load_one(folder: Path, **changes: object):
    entry = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"]


def test_paths_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLIP_TEST_ROOT", "/somewhere")
    (tmp_path / "sub").mkdir()
    folder = tmp_path / "sub"
    assert load_one(folder).data.path == folder / "images"
    assert load_one(folder, path=None, root="images").data.path == folder / "images"
    assert load_one(folder, path="$LLIP_TEST_ROOT/a").data.path == Path("/somewhere/a")
    assert load_one(folder, path="${LLIP_TEST_ROOT:-data}/a").data.path == Path("/somewhere/a")
    assert load_one(folder, path="${LLIP_TEST_UNSET:-data/x}/a").data.path == tmp_path / "data/x/a"
    assert load_one(folder, path="~/a").data.path == Path.home() / "a"
    assert load_one(folder, prompts="p.txt").prompts == TextSource("file", str(folder / "p.txt"))
    with pytest.raises(UserError, match="variable LLIP_TEST_UNSET is not set"):
        load_one(folder, path="$LLIP_TEST_UNSET/a").data.open()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"type": "imagefoldr"},
            ["'task'", "'imagefoldr'", "filelist, imagefolder, retrieval, torchvision", "mean 'im"],
        ),
        ({"type": 3}, ["type = 3", "known types"]),
        ({"metric": "top_1"}, ["metric = 'top_1'", "mean_per_class", "Did you mean 'top1'"]),
        ({"metric": "recall"}, ["a classification task has one of"]),
        ({"prompt": ["a {c}"]}, ["no field 'prompt'", "'prompts'"]),
        ({"path": None}, ["'path' is missing"]),
        ({"num_classes": "ten"}, ["num_classes = 'ten'", "classes expected"]),
        ({"split": 3}, ["split = 3", "string"]),
        ({"prompts": []}, ["prompts = []"]),
        ({"type": "retrieval", "path": "x"}, ["type 'retrieval' has no field 'prompts'"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_one(tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)


def test_broken_catalogs(tmp_path: Path) -> None:
    path = tmp_path / "catalog.json"
    for text, words in [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"a": 1}', "not an object"),
        ('{"a": {"type": "x", "type": "y"}}', "'type' twice"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_catalog(path)
    with pytest.raises(UserError, match=r"Did you mean 'dataset_catalog.json'"):
        load_catalog("dataset_catalogue.json")


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'cifar1000'.*'cifar100'"):
        load_catalog().select(["cifar10", "cifar1000"])


def test_fingerprint_follows_entry_and_texts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a {c}\n")
    first = load_one(tmp_path, prompts="p.txt").fingerprint
    assert load_one(tmp_path, prompts="p.txt").fingerprint == first
    assert load_one(tmp_path, prompts="p.txt", split="val").fingerprint != first
    (tmp_path / "p.txt").write_text("the {c}\n")
    assert load_one(tmp_path, prompts="p.txt").fingerprint != first


def test_shipped_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLIP_DATASETS", "/datasets")
    monkeypatch.delenv("LLIP_SCENES", raising=False)
    monkeypatch.chdir(tmp_path)
    catalog = load_catalog()
    assert catalog["imagenet"].data.path == Path("/datasets/imagenet")
    assert catalog["scenes_top_left"].data.path == tmp_path / "data/scenes/scenes_top_left"
    # METHOD's protocol: these four are measured per class
    per_class = {name for name, entry in catalog.items() if entry.metric == "mean_per_class"}
    assert per_class == {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"}
    assert {name for name, entry in catalog.items() if entry.kind == "retrieval"} == {
        "scenes_retrieval",
        "flickr30k",
        "mscoco",
    }
    for entry in catalog.values():
        for source in (entry.classnames, entry.prompts):
            assert source.kind != "file" or Path(source.value).is_file(), source


def test_shipped_texts_fit_their_entries() -> None:
    used = set()
    for entry in load_catalog().values():
        if entry.kind != "classification" or "file" not in (entry.classnames.kind, entry.prompts.kind):
            continue
        used |= {entry.classnames.value, entry.prompts.value}
        own = [f"class {i}" for i in range(entry.num_classes)]
        if entry.classnames.kind == "file" and entry.classnames.value.endswith(".json"):
            own = None
            names = entry.classnames.read(None, "classnames")
            assert len(names) >= entry.num_classes
            assert len(set(names.values())) == len(names)
            continue
        labels = resolve_labels(entry.classnames, entry.prompts, own, None, entry.num_classes)
        assert len(set(labels.classnames)) == entry.num_classes
    files = {str(file) for folder in ("classnames", "prompts") for file in (CATALOG_FOLDER / folder).iterdir()}
    assert files <= used, "a file of class names or prompts that no entry uses"
