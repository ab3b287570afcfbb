"""The catalog: what it accepts, what it says about mistakes, and the one that is shipped."""

import importlib.util
import json
from pathlib import Path

import pytest

from llip.clipeval.catalog.catalog import CATALOG_FOLDER, load_catalog
from llip.clipeval.catalog.opening import labels_of
from llip.clipeval.dataset_types.folders import ImageFiles
from llip.clipeval.texts.labels import resolve_labels
from llip.clipeval.texts.sources import TextSource
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
            ["'task'", "'imagefoldr'", "filelist, imagefolder, jsonl, karpathy, retrieval", "mean 'im"],
        ),
        ({"type": 3}, ["type = 3", "known types"]),
        ({"metric": "top_1"}, ["metric = 'top_1'", "mean_per_class", "Did you mean 'top1'"]),
        ({"metric": "acc"}, ["metric = 'acc'; a classification task has one of", "roc_auc, mAP"]),
        ({"metric": "recall"}, ["a classification task has one of"]),
        ({"metrics": ["top1", "top_5"]}, ["metric = 'top_5'", "Did you mean 'top5'"]),
        ({"metrics": ["top1", "top1"]}, ["metrics = ['top1', 'top1']", "a list of different metrics"]),
        ({"metrics": []}, ["metrics = []"]),
        ({"metrics": "top1"}, ["metrics = 'top1'", "expected a list"]),
        ({"metric": "top1", "metrics": ["top5"]}, ["both metric and metrics"]),
        ({"crop_border": -3}, ["crop_border = -3", "at least 0"]),
        ({"prompt": ["a {c}"]}, ["no field 'prompt'", "'prompts'"]),
        ({"path": None}, ["'path' is missing"]),
        ({"num_classes": "ten"}, ["num_classes = 'ten'", "expected a whole number of classes, at least 2"]),
        ({"split": 3}, ["split = 3", "string"]),
        ({"prompts": []}, ["prompts = []"]),
        ({"type": "retrieval", "path": "x"}, ["type 'retrieval' has no field 'prompts'"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_one(tmp_path, **changes)
    for word in words:
        assert str(caught.value).count(word) == 1  # choices are listed once


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


@pytest.mark.parametrize("name", ["", "x" * 300, "\u2603" * 40, "a\nb", "a\0b"])
def test_a_name_that_cannot_be_a_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected a name of printable characters, short enough for a file name"):
        load_catalog(write_catalog(tmp_path / "catalog.json", {name: GOOD}))


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        load_catalog(tmp_path / "catalog.json")


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


SUITE = [
    "food101",
    "cifar10",
    "cifar100",
    "cub200",
    "sun397",
    "stanford_cars",
    "fgvc_aircraft",
    "dtd",
    "oxford_pets",
    "caltech101",
    "flowers102",
    "mnist",
    "fer2013",
    "stl10",
    "eurosat",
    "resisc45",
    "gtsrb",
    "kitti",
    "country211",
    "pcam",
    "ucf101",
    "kinetics700",
    "clevr_counts",
    "hateful_memes",
    "rendered_sst2",
    "imagenet",
]


def test_the_shipped_catalog_is_complete() -> None:
    catalog = load_catalog()
    assert len(SUITE) == 26
    others = ["mit_states", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet", "sklearn_digits"]
    assert {*SUITE, *others, "flickr30k", "mscoco"} == {name for name in catalog if not name.startswith("scenes_")}
    assert {name: catalog[name].metric for name in SUITE if catalog[name].metric not in ("top1", "mean_per_class")} == {
        "kinetics700": "mean_top1_top5",
        "hateful_memes": "roc_auc",
    }
    for name, entry in catalog.items():
        assert entry.source, name
        assert name in ("caltech101", "kinetics700", "mit_states") or name.startswith("scenes_") or entry.num_images, (
            name
        )


def test_shipped_texts_fit_their_entries() -> None:
    pytest.importorskip("clip_benchmark")
    used = set()
    for entry in load_catalog().values():
        if entry.kind != "classification" or entry.num_classes is None:
            continue
        used |= {source.value for source in (entry.classnames, entry.prompts) if source.kind == "file"}
        own = [f"class {i}" for i in range(entry.num_classes)]
        if entry.label_names is not None:
            own = list(entry.label_names)
        if entry.class_keys is not None:
            own = list(entry.class_keys.read(None, "class_keys"))[: entry.num_classes]
        labels = resolve_labels(entry.classnames, entry.prompts, own, None, entry.num_classes, entry.class_keys)
        repeated = 2 if entry.num_classes == 1000 else 0  # OpenCLIP gives two names of ImageNet to two classes each
        assert len(set(labels.classnames)) == entry.num_classes - repeated
    files = {str(file) for file in (CATALOG_FOLDER / "prompts").iterdir()}
    assert files <= used, "a file of prompts that no entry uses"


SLIP_LABELS = {  # of its labels.json, whose order is that of its own copies of the sets
    "clevr_counts": ["10", "3", "4", "5", "6", "7", "8", "9"],
    "kitti": [
        "a photo i took with a car in the distance.",
        "a photo i took with a car nearby.",
        "a photo i took of a car on my left or right side.",
        "a photo i took with no car.",
    ],
    "fer2013": [
        ["angry"], ["disgusted"], ["fearful"], ["happy", "smiling"], ["neutral", "bored"], ["sad", "depressed"],
        ["surprised", "shocked", "spooked"],
    ],
}  # fmt: skip
LABELS = {  # what the readers of the shipped entries return as class 0, 1, ...
    "clevr_counts": [str(count) for count in range(3, 11)],
    "kitti": [SLIP_LABELS["kitti"][place] for place in (2, 1, 0, 3)],  # the closest car: up to 8 m, 20 m, further, none
    "fer2013": ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"],
}


@pytest.mark.parametrize("task", sorted(LABELS))
def test_names_in_another_order_drop_in(task: str, tmp_path: Path) -> None:
    """These readers have no class names; the entry's label_names do: clip-benchmark and SLIP have other orders."""
    raw = json.loads((CATALOG_FOLDER / "dataset_catalog.json").read_text())[task]
    (tmp_path / "labels.json").write_text(json.dumps(SLIP_LABELS))
    raw |= {"classnames": f"labels.json#{task}", "prompts": ["{c}"]}
    entry = load_catalog(write_catalog(tmp_path / "catalog.json", {task: raw}))[task]
    source = ImageFiles([], [])
    given = [name if isinstance(name, str) else name[0] for name in labels_of(entry, source).classnames]
    assert given == LABELS[task]
    assert list(load_catalog()[task].label_names) == LABELS[task]
    if importlib.util.find_spec("clip_benchmark"):
        shipped = labels_of(load_catalog()[task], source).classnames
        numbers = ["three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        assert list(shipped) == (numbers if task == "clevr_counts" else LABELS[task])


def test_what_people_read_is_no_part_of_the_task(tmp_path: Path) -> None:
    first = load_one(tmp_path)
    second = load_one(tmp_path, note="new", source="https://example.org", download="get {path}")
    assert second.fingerprint == first.fingerprint
    assert (second.source, second.download) == ("https://example.org", f"get {tmp_path / 'images'}")
