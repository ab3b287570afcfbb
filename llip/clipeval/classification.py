"""A task of zero-shot classification: every image scored against every class.

Shapes: B images, C classes, K mixture tokens, D embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.catalog.opening import check_batch, check_targets, labels_of, open_source
from llip.clipeval.loading import ImageBatch, Unreadable, describe_skipped
from llip.clipeval.metrics import METRICS, NEED_SCORES, TOP, Predictions, check_metrics
from llip.clipeval.outcomes import Outcomes, hash_samples
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_run import TaskRun
from llip.clipeval.texts.classifier import Classifier, build_classifier
from llip.clipeval.texts.labels import hash_texts


def classify(entry: Entry, run: TaskRun) -> dict[str, Any]:
    """Evaluate one task on every process and return the fields of its result.

    Raises:
        TaskError: it cannot be evaluated.
    """
    with run.fail_together():
        source = open_source(entry)
        labels = labels_of(entry, source)
        check_targets(source, labels)
        check_metrics(entry.metrics, len(labels.classnames), source.multi_label)
    classifier = build_classifier(run, labels, entry.name)
    keep_scores = not NEED_SCORES.isdisjoint(entry.metrics)
    mine: list[Predictions] = []
    unreadable: list[Unreadable] = []
    with run.fail_together():
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                check_batch(batch.indices, batch.targets, source, labels)
                mine.append(predict(run.scorer, batch, run.encode(batch, source), classifier, keep_scores=keep_scores))
    shares = run.processes.all_gather_object((mine, unreadable))
    with run.fail_together():
        skipped = describe_skipped([item for _, items in shares for item in items], len(source))
        predictions = Predictions.join([part for parts, _ in shares for part in parts])
        outcomes = _outcomes(predictions, [source.name(index) for index in predictions.indices.tolist()])
        values = {metric: METRICS[metric](predictions) for metric in entry.metrics}
    return {
        "values": values,
        "n": len(predictions.indices),
        "samples": outcomes.samples,
        "outcomes": outcomes,
        **skipped,
        "classnames_hash": hash_texts(labels.classnames),
        "prompts_hash": hash_texts(labels.templates),
    }


def predict(
    scorer: Scorer, batch: ImageBatch, h: Tensor, classifier: Classifier, *, keep_scores: bool = False
) -> Predictions:
    """Score the mixture tokens [B, K, D] of one batch against every class."""
    scores = classifier.scores(scorer, h)  # [B, C]
    # a stable sort: equal scores rank by class number, on every device and for every number of processes
    order = scores.sort(dim=1, descending=True, stable=True).indices
    several = any(isinstance(target, tuple) for target in batch.targets)
    truth = _truth(batch.targets, scores.shape[1]) if several else None
    return Predictions(
        indices=torch.tensor(batch.indices, dtype=torch.int64),
        labels=torch.tensor(batch.targets, dtype=torch.int64) if truth is None else _best_true(truth, order.cpu()),
        top=order[:, :TOP].cpu(),
        margin=(scores[:, 1] - scores[:, 0]).cpu(),
        classes=scores.shape[1],
        scores=scores.cpu() if keep_scores else None,
        truth=truth,
    )


def _truth(targets: Sequence[Sequence[int]], classes: int) -> Tensor:
    truth = torch.zeros(len(targets), classes, dtype=torch.bool)
    for row, labels in enumerate(targets):
        truth[row, list(labels)] = True
    return truth


def _best_true(truth: Tensor, order: Tensor) -> Tensor:
    hits = truth.gather(1, order)
    best = order.gather(1, hits.int().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(hits.any(dim=1), best, -1)


def _outcomes(predictions: Predictions, names: Sequence[str]) -> Outcomes:
    labels, truth = predictions.labels, predictions.truth
    hits = predictions.top == labels[:, None]
    ranks = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), TOP)
    targets = labels.tolist() if truth is None else [row.nonzero()[:, 0].tolist() for row in truth]
    return Outcomes(hash_samples(names, targets), ranks.to(torch.uint8).numpy(), labels=labels.to(torch.int32).numpy())
