"""Per-sample outcomes: values from hand-worked cases, and what a file survives."""

from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.outcomes import Outcomes, hash_samples, load_outcomes, outcomes_file, parts_of, save_outcomes

CLASSES = Outcomes("abc", np.array([0, 0, 4, 5, 0], np.uint8), np.array([0, 0, 0, 1, 1], np.int32))
PAIRS = Outcomes(  # two images; the first has three captions, found at places 0, 4 and beyond; the second has one
    "def",
    np.array([0, 7], np.uint8),
    text_ranks=np.array([0, 4, 10, 9], np.uint8),
    owners=np.array([0, 0, 0, 1], np.int32),
)


@pytest.mark.parametrize(
    ("outcomes", "name", "value"),
    [
        (CLASSES, "top1", 3 / 5),
        (CLASSES, "top5", 4 / 5),
        (CLASSES, "mean_top1_top5", 7 / 10),
        (CLASSES, "mean_per_class", (2 / 3 + 1 / 2) / 2),
        (PAIRS, "image_to_text_R@1", 1 / 2),
        (PAIRS, "image_to_text_R@10", 1),
        (PAIRS, "text_to_image_R@1", 1 / 4),
        (PAIRS, "text_to_image_R@5", 2 / 4),
        (PAIRS, "text_to_image_R@10", 3 / 4),
    ],
)
def test_values(outcomes: Outcomes, name: str, value: float) -> None:
    assert parts_of(outcomes, name).value() == pytest.approx(value)


def test_a_ranking_is_no_sum_over_images() -> None:
    assert parts_of(CLASSES, "roc_auc") is None


def test_file(tmp_path: Path) -> None:
    path = outcomes_file(tmp_path / "results.json", "a/b task")
    assert path.parent == tmp_path / "per_sample"  # the slash is no folder
    assert outcomes_file(tmp_path / "results.previous.json", "t").parent == tmp_path / "per_sample.previous"
    assert load_outcomes(path) is None
    save_outcomes(path, PAIRS)
    read = load_outcomes(path)
    assert read.samples == "def"
    for name in ("ranks", "labels", "text_ranks", "owners"):
        assert np.array_equal(getattr(read, name), getattr(PAIRS, name))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-30])
    assert load_outcomes(path) is None
    np.savez(path, samples=np.array(["x"], dtype=object), ranks=0, labels=0, text_ranks=0, owners=0)
    assert load_outcomes(path) is None  # objects would have to be unpickled


def test_hash_follows_names_targets_and_order_but_not_folders() -> None:
    first = hash_samples(["/a/1.png", "/a/2.png"], [0, 1])
    assert hash_samples(["/b/c/1.png", "/b/c/2.png"], [0, 1]) == first
    others = [
        hash_samples(["/a/2.png", "/a/1.png"], [0, 1]),
        hash_samples(["/a/1.png", "/a/2.png"], [1, 0]),
        hash_samples(["/a/1.png", "/a/3.png"], [0, 1]),
    ]
    assert len({first, *others}) == 4
