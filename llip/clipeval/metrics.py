"""Metrics by name. Values are fractions in [0, 1]; tables show percentages.

N images, C classes. Catalog entries name their metrics; no code here depends on a dataset. Recall at K of retrieval is
`recall_at`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llip.errors import UserError

CLASSIFICATION = "classification"
RETRIEVAL = "retrieval"
RECALLS = (1, 5, 10)
"""The K of retrieval's R@K."""

TOP = 5
"""Number of best classes that a prediction keeps."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of zero-shot classification for N images, on the CPU.

    Attributes:
        indices: of the images in the dataset [N], int64.
        labels: true classes [N], int64; of an image of several classes the best-scored one, of one without any -1.
        top: the min(5, C) best classes of each image, best first, int64.
        margin: score of class 1 minus score of class 0 [N], float32: the ranking that ROC AUC needs of two classes.
        classes: C.
        scores: of every class [N, C], float32; large, so only for the metrics of `NEED_SCORES`.
        truth: which classes an image is of [N, C], bool; None if each image is of one class.
    """

    indices: Tensor
    labels: Tensor
    top: Tensor
    margin: Tensor
    classes: int
    scores: Tensor | None = None
    truth: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Join batches of all processes, all with the same fields, in the order of the dataset."""
        order = torch.cat([part.indices for part in parts]).argsort()
        joined: dict[str, Any] = {"classes": parts[0].classes}
        for field in fields(cls):
            if isinstance(getattr(parts[0], field.name), Tensor):
                joined[field.name] = torch.cat([getattr(part, field.name) for part in parts])[order]
        predictions = cls(**joined)
        assert bool((predictions.indices.diff() > 0).all()), "an image was scored twice"
        return predictions


Metric = Callable[[Predictions], float]
METRICS: dict[str, Metric] = {}
NEED_SCORES = frozenset({"mAP"})
"""Metrics that need the scores of all classes."""

MULTI_LABEL = frozenset({"mAP"})
"""Metrics that are defined for images of several classes."""


def _metric(function: Metric) -> Metric:
    METRICS[function.__name__] = function
    return function


@_metric
def top1(predictions: Predictions) -> float:
    """Fraction of images whose best class is the true one."""
    return (predictions.top[:, 0] == predictions.labels).double().mean().item()


@_metric
def top5(predictions: Predictions) -> float:
    """Fraction of images whose true class is among the five best."""
    return (predictions.top == predictions.labels[:, None]).any(dim=1).double().mean().item()


@_metric
def mean_per_class(predictions: Predictions) -> float:
    """Top-1 within each class, averaged over the classes that have images."""
    hits = (predictions.top[:, 0] == predictions.labels).double()
    totals = torch.bincount(predictions.labels, minlength=predictions.classes)
    correct = torch.bincount(predictions.labels, weights=hits, minlength=predictions.classes)
    present = totals > 0
    return (correct[present] / totals[present]).mean().item()


@_metric
def mean_top1_top5(predictions: Predictions) -> float:
    """Mean of top-1 and top-5."""
    return (top1(predictions) + top5(predictions)) / 2


@_metric
def roc_auc(predictions: Predictions) -> float:
    """Area under the ROC curve of class 1 against class 0: P(positive above negative), ties counting one half."""
    positive = predictions.labels == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise UserError("metric 'roc_auc' needs images of both classes, and one class has none")
    _, inverse, counts = torch.unique(predictions.margin, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = ends - (counts.double() - 1) / 2  # tied margins share the middle of their ranks, from 1
    rank_sum = ranks[inverse][positive].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


@_metric
def mAP(predictions: Predictions) -> float:
    """Mean average precision: each class ranks all images; averaged over the classes that have images."""
    assert predictions.scores is not None, "mAP needs the scores of all classes"
    truth = predictions.truth
    if truth is None:
        truth = predictions.labels[:, None] == torch.arange(predictions.classes)
    present = truth.any(dim=0)
    if not present.any():
        raise UserError("metric 'mAP' needs images with a class, and no image has one")
    columns = zip(predictions.scores.T[present], truth.T[present], strict=True)
    return sum(average_precision(scores, hits) for scores, hits in columns) / int(present.sum())


def average_precision(scores: Tensor, hits: Tensor) -> float:
    """Return the sum over thresholds of precision times gain in recall; images of equal score [N] enter together."""
    values, inverse = torch.unique(scores, return_inverse=True)
    positions = len(values) - 1 - inverse  # the highest score first
    right = torch.bincount(positions, weights=hits.double(), minlength=len(values))
    retrieved, seen = right.cumsum(0), torch.bincount(positions, minlength=len(values)).cumsum(0)
    return (right * retrieved / seen).sum().item() / retrieved[-1].item()


def check_metrics(metrics: Iterable[str], classes: int, multi_label: bool) -> None:
    """Raise a `UserError` for a metric that is not defined for this number of classes, or for several per image."""
    for metric in metrics:
        if multi_label and metric not in MULTI_LABEL:
            fitting = " or ".join(sorted(MULTI_LABEL))
            raise UserError(f"metric {metric!r} is for one class per image, and here are several; use {fitting}")
        if metric == "top5" and classes <= TOP:
            raise UserError(f"metric 'top5' is 1 by definition with {classes} classes; use 'top1'")
        if metric == "roc_auc" and classes != 2:
            raise UserError(f"metric 'roc_auc' is for 2 classes, not {classes}; use 'top1' or 'mean_per_class'")


def recall_at(first_hits: Tensor, k: int) -> float:
    """Fraction of queries with a right answer among the first `k`; `first_hits` [N] are ranks from 0."""
    return (first_hits < k).double().mean().item()


RETRIEVAL_METRICS = ("recall",)


def metric_names(kind: str) -> tuple[str, ...]:
    """Return the metrics that a task of `kind` (classification or retrieval) may declare."""
    return tuple(METRICS) if kind == CLASSIFICATION else RETRIEVAL_METRICS
