"""Metrics against cases worked out by hand."""

import numpy as np
import pytest
import torch

from llip.clipeval.metrics import (
    METRICS,
    Predictions,
    average_precision,
    check_metrics,
    metric_names,
    recall_at,
    roc_auc,
)
from llip.clipeval.retrieval import DEPTH, best_of, first_hit
from llip.errors import UserError

LABELS = torch.tensor([0, 0, 0, 1, 2, 2])
TOP = torch.tensor(
    [
        [0, 1, 2, 3, 4],  # right
        [1, 0, 2, 3, 4],  # second
        [5, 4, 3, 2, 1],  # not among five
        [1, 0, 2, 3, 4],  # right
        [3, 4, 5, 0, 2],  # fifth
        [2, 1, 0, 3, 4],  # right
    ]
)
SIX = Predictions(torch.arange(6), LABELS, TOP, torch.zeros(6), classes=6)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("top1", 3 / 6),
        ("top5", 5 / 6),
        ("mean_top1_top5", (3 / 6 + 5 / 6) / 2),
        ("mean_per_class", (1 / 3 + 1 + 1 / 2) / 3),  # classes 3, 4, 5 have no image and do not count
    ],
)
def test_hand_worked(metric: str, expected: float) -> None:
    assert METRICS[metric](SIX) == pytest.approx(expected)


def two_classes(labels: list[int], margin: list[float]) -> Predictions:
    margins = torch.tensor(margin)
    top = torch.stack([(margins > 0).long(), (margins <= 0).long()], dim=1)
    return Predictions(torch.arange(len(labels)), torch.tensor(labels), top, margins, classes=2)


@pytest.mark.parametrize(
    ("labels", "margin", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 1.0),
        ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], 0.0),
        ([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], 3 / 4),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 1 / 2),
        ([0, 1, 1], [0.2, 0.2, 0.9], (0.5 + 1) / 2),  # a tie counts one half
    ],
)
def test_roc_auc_by_hand(labels: list[int], margin: list[float], expected: float) -> None:
    assert roc_auc(two_classes(labels, margin)) == pytest.approx(expected)


def test_roc_auc_is_the_share_of_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=generator)
    margin = torch.randint(0, 9, (60,), generator=generator).float()  # many ties
    pairs = [(p > n) + 0.5 * (p == n) for p in margin[labels == 1] for n in margin[labels == 0]]
    expected = torch.stack(pairs).mean().item()
    assert roc_auc(two_classes(labels.tolist(), margin.tolist())) == pytest.approx(expected)


def test_metrics_refuse_what_they_cannot_measure() -> None:
    with pytest.raises(UserError, match="both classes"):
        roc_auc(two_classes([1, 1], [0.0, 1.0]))
    with pytest.raises(UserError, match="2 classes, not 6"):
        check_metrics(["top1", "roc_auc"], 6, multi_label=False)
    with pytest.raises(UserError, match="1 by definition with 2 classes"):
        check_metrics(["top1", "top5"], 2, multi_label=False)
    with pytest.raises(UserError, match="'top1' is for one class per image, and here are several; use mAP"):
        check_metrics(["mAP", "top1"], 6, multi_label=True)
    check_metrics(["top1", "top5", "mAP", "mean_per_class", "mean_top1_top5"], 6, multi_label=False)


def test_names_by_kind() -> None:
    expected = ("top1", "top5", "mean_per_class", "mean_top1_top5", "roc_auc", "mAP")
    assert metric_names("classification") == expected
    assert metric_names("retrieval") == ("recall",)


def test_recall_and_first_hit() -> None:
    hits = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    ranks = first_hit(hits)
    assert ranks.tolist() == [0, 2, DEPTH]
    assert [recall_at(ranks, k) for k in (1, 2, 3, 10)] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_equal_scores_rank_by_image_index() -> None:
    scores, images = best_of(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[7, 4, 2]]))
    assert images.tolist() == [[4, 2, 7]]
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.5, 0.5]]))


def ranked(scores: list[list[float]], labels: list[int] | None = None, truth: list[list[int]] | None = None):
    scores = torch.tensor(scores)
    return Predictions(
        indices=torch.arange(len(scores)),
        labels=torch.tensor(labels if labels is not None else [0] * len(scores)),
        top=scores.argsort(dim=1, descending=True)[:, :5],
        margin=scores[:, 1] - scores[:, 0],
        classes=scores.shape[1],
        scores=scores,
        truth=None if truth is None else torch.tensor(truth, dtype=torch.bool),
    )


def test_average_precision_by_hand() -> None:
    # right at places 1, 3 and 4 of 5: precisions 1/1, 2/3, 3/4
    scores, hits = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True, False])
    assert average_precision(scores, hits) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    assert average_precision(scores[shuffled], hits[shuffled]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # the second and third are equal and enter together: 1/1 for one of two, then 2/3 for the other
    assert average_precision(torch.tensor([3.0, 2.0, 2.0]), torch.tensor([True, True, False])) == pytest.approx(
        (1 + 2 / 3) / 2
    )


def test_map_by_hand() -> None:
    scores = [[0.9, 0.1, 0.3], [0.8, 0.2, 0.3], [0.1, 0.7, 0.3]]
    truth = [[1, 0, 0], [0, 1, 0], [1, 1, 0]]  # class 2 has no image and does not count
    # class 0: places 1 and 3 -> (1 + 2/3) / 2; class 1: places 2 and 1 -> 1
    assert METRICS["mAP"](ranked(scores, truth=truth)) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    # one class per image: class 0 has image 0 at place 1, class 1 has images 1 and 2 at places 2 and 1
    assert METRICS["mAP"](ranked(scores, labels=[0, 1, 1])) == pytest.approx(1.0)
    with pytest.raises(UserError, match="no image has one"):
        METRICS["mAP"](ranked(scores, truth=[[0, 0, 0]] * 3))


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    images, classes = 60, 7
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
    scores = (rng.integers(0, 12, (images, classes)) / 12).astype(np.float32)  # many ties
    scores[np.arange(images), labels] += 0.25
    one_hot = np.eye(classes, dtype=bool)[labels]
    predictions = ranked(scores.tolist(), labels.tolist())
    expected = sklearn.average_precision_score(one_hot, scores, average="macro")
    assert METRICS["mAP"](predictions) == pytest.approx(expected)
    several = one_hot | (rng.random((images, classes)) < 0.2)
    predictions = ranked(scores.tolist(), truth=several.tolist())
    assert METRICS["mAP"](predictions) == pytest.approx(sklearn.average_precision_score(several, scores))

    untied = rng.random((images, classes)).astype(np.float32)
    predictions = ranked(untied.tolist(), labels.tolist())
    guesses = untied.argmax(axis=1)
    assert METRICS["top1"](predictions) == pytest.approx(sklearn.accuracy_score(labels, guesses))
    top5 = sklearn.top_k_accuracy_score(labels, untied, k=5, labels=range(classes))
    assert METRICS["top5"](predictions) == pytest.approx(top5)
    assert METRICS["mean_per_class"](predictions) == pytest.approx(sklearn.balanced_accuracy_score(labels, guesses))
    binary = labels % 2
    margins = np.round(rng.random(images), 1)
    assert roc_auc(two_classes(binary.tolist(), margins.tolist())) == pytest.approx(
        sklearn.roc_auc_score(binary, margins.astype(np.float32))
    )
