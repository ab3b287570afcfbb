"""Evaluate a model on the tasks of a catalog: alone, or on every process of an initialised process group.

Each image is scored once, on one process; results are gathered exactly and are the same on every process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llip.clipeval import retrieval, zero_shot
from llip.clipeval.catalog import Catalog, Entry
from llip.clipeval.datasets import ImageSource
from llip.clipeval.labels import Labels, hash_texts, resolve_labels
from llip.clipeval.loading import Batch, Preprocess, Unreadable, image_batches
from llip.clipeval.metrics import CLASSIFICATION, METRICS, RETRIEVAL, Predictions
from llip.clipeval.processes import Processes, TaskError
from llip.clipeval.zero_shot import PROMPT_ENSEMBLES, Scorer
from llip.errors import UserError, did_you_mean

NAMED_UNREADABLE = 20
"""Unreadable images that a result names; the count is always complete."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Attributes:
        task, metric: the entry's name and metric.
        values: fractions in [0, 1]: {metric: value}, or six recalls in retrieval; empty after an error.
        n: images scored. texts: captions scored (retrieval).
        seconds: wall time of the slowest process; images_per_second: n over that, all processes together.
        skipped: images that could not be read; skipped_images: the first of them, by name and reason.
        error: why the task could not be evaluated, or None.
        classnames_hash, prompts_hash: SHA-256 beginnings; in retrieval prompts_hash is that of the captions.
        fingerprint: the catalog entry's.
    """

    task: str
    metric: str
    values: dict[str, float] = field(default_factory=dict)
    n: int = 0
    texts: int | None = None
    seconds: float = 0.0
    images_per_second: float = 0.0
    skipped: int = 0
    skipped_images: tuple[str, ...] = ()
    error: str | None = None
    classnames_hash: str | None = None
    prompts_hash: str | None = None
    fingerprint: str | None = None

    @property
    def value(self) -> float | None:
        """The metric's value, None for retrieval (see `values`) and after an error."""
        return self.values.get(self.metric)

    def to_json(self) -> dict[str, Any]:
        """Return the task's object in results.json and evals.jsonl: metric, value (or the recalls), n, seconds, ..."""
        fields = asdict(self)
        task, values = fields.pop("task"), fields.pop("values")
        del task
        values = {"value": values[self.metric]} if self.metric in values else values
        return {"metric": fields.pop("metric"), **values, **{k: v for k, v in fields.items() if v is not None}}

    @classmethod
    def from_json(cls, task: str, fields: dict[str, Any]) -> "TaskResult":
        """Read back what `to_json` wrote."""
        fields = dict(fields)
        values = {key: fields.pop(key) for key in list(fields) if "_R@" in key}
        if "value" in fields:
            values[fields["metric"]] = fields.pop("value")
        fields["skipped_images"] = tuple(fields.get("skipped_images", ()))
        return cls(task=task, values=values, **fields)


def classification_mean(results: Sequence[TaskResult]) -> float | None:
    """Return the mean of the classification tasks' values, None without any."""
    values = [result.value for result in results if result.value is not None]
    return sum(values) / len(values) if values else None


def evaluate_tasks(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Callable[[list[str]], Tensor],
    tasks: Sequence[str] | None,
    catalog: Catalog,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 64,
    workers: int = 4,
    prompt_ensemble: str = "feature",
    on_result: Callable[[TaskResult], None] | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Evaluate `model` on `tasks` of `catalog`; every process of the group (if any) must call it alike.

    A task that cannot be evaluated gives a result with an error, and the others run. The modules' modes and the random
    state are left as they were found.

    Args:
        model: answers encode_image, encode_text and similarity as `llip.open_clip.model.Llip` does; on `device`, not
            wrapped in DDP.
        preprocess: PIL image -> normalised tensor [3, H, W]. tokenizer: texts -> token ids [T, context].
        tasks: names, None for the whole catalog.
        batch_size, workers: images per batch and decoding processes, per process of the group.
        prompt_ensemble: `feature` (mean of text features, CLIP's protocol) or `score` (mean of scores over prompts).
        on_result: called on every process after each task.
        progress: show progress bars (on the first process).

    Raises:
        UserError: an unknown task or prompt ensemble.
    """
    if prompt_ensemble not in PROMPT_ENSEMBLES:
        raise UserError(f"prompt_ensemble = {prompt_ensemble!r}.{did_you_mean(prompt_ensemble, PROMPT_ENSEMBLES)}")
    device = torch.device(device)
    scorer = Scorer(model, preprocess, tokenizer, device, autocast_dtype)
    run = _Run(scorer, Processes(), batch_size, workers, prompt_ensemble, progress)
    results = []
    with _evaluating(model, device):
        for entry in catalog.select(tasks):
            results.append(_evaluate(entry, run))
            if on_result is not None:
                on_result(results[-1])
    return results


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, and a random state that the caller does not notice."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = [device] if device.type == "cuda" else []
    try:
        # no_grad, not inference_mode: what a model caches in here must stay usable in training
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class _Run:
    """How to evaluate: the same for all tasks."""

    scorer: Scorer
    processes: Processes
    batch_size: int
    workers: int
    prompt_ensemble: str
    progress: bool

    def batches(self, source: ImageSource, task: str) -> Iterator[Batch]:
        """Yield this process's share of the images, with a progress bar on the first process."""
        share = self.processes.share(len(source))
        shown = self.progress and self.processes.is_first
        with tqdm(total=len(share), desc=task, unit="img", disable=not shown, leave=False) as bar:
            for batch in image_batches(source, self.scorer.preprocess, share, self.batch_size, self.workers):
                yield batch
                bar.update(len(batch.indices) + len(batch.unreadable))


def _open(entry: Entry) -> ImageSource:
    source = entry.data.open()
    if len(source) == 0:
        raise UserError(f"the dataset is empty: no image for {entry.data}")
    if entry.num_images is not None and len(source) != entry.num_images:
        raise UserError(f"{len(source)} images, but the entry expects num_images = {entry.num_images}: {entry.data}")
    return source


def _evaluate(entry: Entry, run: _Run) -> TaskResult:
    started = time.perf_counter()
    try:
        evaluate = {CLASSIFICATION: _classify, RETRIEVAL: _retrieve}[entry.kind]
        outcome = evaluate(entry, run)
    except TaskError as error:
        outcome = {"error": str(error)}
    elapsed = time.perf_counter() - started
    seconds = max(run.processes.together(lambda: elapsed))
    return TaskResult(
        task=entry.name,
        metric=entry.metric,
        seconds=seconds,
        images_per_second=outcome.get("n", 0) / seconds,
        fingerprint=entry.fingerprint,
        **outcome,
    )


def _classify(entry: Entry, run: _Run) -> dict[str, Any]:
    """Return the fields of a classification task's result."""
    processes, scorer = run.processes, run.scorer

    def prepare() -> tuple[ImageSource, Labels]:
        source = _open(entry)
        own = source.classnames, source.templates
        return source, resolve_labels(entry.classnames, entry.prompts, *own, entry.num_classes)

    def encode_classes() -> Tensor | None:  # [C of this process, Q, D]
        classes = processes.share(len(labels.classnames))
        return zero_shot.class_features(scorer, labels, classes, run.prompt_ensemble).cpu() if classes else None

    def predict() -> tuple[list[zero_shot.BatchPredictions], list[Unreadable]]:
        predictions, unreadable = [], []
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                _check_labels(batch, source, len(labels.classnames))
                predictions.append(zero_shot.predict(scorer, batch, features))
        return predictions, unreadable

    source, labels = processes.locally(prepare)
    parts = processes.together(encode_classes)
    features = torch.empty(len(labels.classnames), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        features[rank :: processes.count] = part if part is not None else 0
    features = features.to(scorer.device)
    shares = processes.together(predict)
    batches = [batch for predictions, _ in shares for batch in predictions]
    unreadable = [item for _, items in shares for item in items]
    return {
        **processes.locally(lambda: _scored(entry, batches, unreadable, len(labels.classnames))),
        **_skipped(unreadable),
        "classnames_hash": labels.classnames_hash,
        "prompts_hash": labels.prompts_hash,
    }


def _scored(
    entry: Entry, batches: list[zero_shot.BatchPredictions], unreadable: list[Unreadable], classes: int
) -> dict[str, Any]:
    """Compute the metric from everyone's predictions."""
    if not batches:
        _raise_all_unreadable(unreadable)
    indices = torch.cat([batch.indices for batch in batches])
    order = indices.argsort()
    assert len(indices.unique()) == len(indices), "an image was scored twice"
    labels, top, margin = (
        torch.cat([getattr(batch, name) for batch in batches])[order] for name in ("labels", "top", "margin")
    )
    value = METRICS[entry.metric](Predictions(labels, top, margin, classes))
    return {"values": {entry.metric: value}, "n": len(indices)}


def _retrieve(entry: Entry, run: _Run) -> dict[str, Any]:
    """Return the fields of a retrieval task's result."""
    processes, scorer = run.processes, run.scorer

    def encode() -> tuple[Tensor, list[int], list[tuple[str, ...]], list[Unreadable]]:
        tokens, indices, captions, unreadable = [], [], [], []
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                tokens.append(scorer.encode_images(batch.images))
                indices += batch.indices
                captions += batch.targets
        return torch.cat(tokens) if tokens else torch.empty(0), indices, captions, unreadable

    def encode_captions() -> tuple[Tensor | None, list[int], list[str]]:
        texts = [text for own in captions for text in own]
        owners = [index for index, own in zip(indices, captions, strict=True) for _ in own]
        return scorer.encode_texts(texts).cpu() if texts else None, owners, texts

    source = processes.locally(lambda: _open(entry))
    h, indices, captions, mine = processes.locally(encode)  # h [N, K, D]
    unreadable = [item for items in processes.together(lambda: mine) for item in items]
    parts = processes.together(encode_captions)
    owners = torch.tensor([owner for _, part, _ in parts for owner in part], dtype=torch.int64)  # [T]
    if not len(owners):
        processes.locally(lambda: _raise_all_unreadable(unreadable))
    # captions in the order of their images, so that ties rank the same for any number of processes
    order = owners.argsort(stable=True)
    texts = torch.cat([features for features, _, _ in parts if features is not None])[order]
    strings = [text for _, _, part in parts for text in part]
    owners, strings = owners[order], [strings[position] for position in order.tolist()]
    images = torch.tensor(indices, dtype=torch.int64)
    shares = processes.together(lambda: retrieval.score_share(scorer, h, images, texts.to(scorer.device), owners))
    return {
        "values": retrieval.recalls(shares, owners),
        "n": sum(len(share.first_hits) for share in shares),
        "texts": len(owners),
        **_skipped(unreadable),
        "prompts_hash": hash_texts(strings),
    }


def _check_labels(batch: Batch, source: ImageSource, classes: int) -> None:
    for index, label in zip(batch.indices, batch.targets, strict=True):
        if not 0 <= label < classes:
            raise UserError(f"image {source.name(index)} has label {label}, but there are {classes} class names")


def _raise_all_unreadable(unreadable: list[Unreadable]) -> None:
    first = min(unreadable, key=lambda item: item.index)
    raise UserError(f"none of {len(unreadable)} images can be read; the first is {first.name}: {first.reason}")


def _skipped(unreadable: list[Unreadable]) -> dict[str, Any]:
    ordered = sorted(unreadable, key=lambda item: item.index)
    named = tuple(f"{item.name}: {item.reason}" for item in ordered[:NAMED_UNREADABLE])
    return {"skipped": len(ordered), "skipped_images": named}
