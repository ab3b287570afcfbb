"""Metrics against cases worked out by hand."""

import pytest
import torch

from llip.clipeval.metrics import METRICS, Predictions, metric_names, recall_at, roc_auc
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
SIX = Predictions(LABELS, TOP, torch.zeros(6), classes=6)


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
    return Predictions(torch.tensor(labels), top, margins, classes=2)


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
        roc_auc(SIX)
    with pytest.raises(UserError, match="1 by definition with 2 classes"):
        METRICS["top5"](two_classes([0, 1], [0.0, 1.0]))


def test_names_by_kind() -> None:
    expected = ("top1", "top5", "mean_per_class", "mean_top1_top5", "roc_auc")
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
