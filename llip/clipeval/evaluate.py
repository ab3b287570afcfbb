"""Evaluate a model on the tasks of a catalog: alone, or on every process of an initialised process group.

Each image is scored once, on one process; results are gathered exactly and are the same on every process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llip.clipeval import retrieval, zero_shot
from llip.clipeval.catalog.catalog import Catalog, Entry
from llip.clipeval.catalog.opening import check_batch, check_targets, labels_of, open_source
from llip.clipeval.datasets import ImageSource
from llip.clipeval.loading import Batch, Preprocess, Unreadable, image_batches
from llip.clipeval.metrics import CLASSIFICATION, METRICS, MULTI_LABEL, NEED_SCORES, RETRIEVAL, Predictions
from llip.clipeval.outcomes import Outcomes, hash_samples
from llip.clipeval.shortlist import Shortlist, text_free_features
from llip.clipeval.task_errors import TaskError, gather_from_all, run_on_all
from llip.clipeval.task_result import TaskResult
from llip.clipeval.texts.cache import TextCache
from llip.clipeval.texts.labels import Labels, hash_texts
from llip.clipeval.zero_shot import PROMPT_ENSEMBLES, Scorer
from llip.errors import UserError, did_you_mean
from llip.open_clip.model import Llip
from llip.system.processes import Processes

NAMED_UNREADABLE = 20
"""Unreadable images that a result names; the count is always complete."""


def evaluate_tasks(
    model: Llip,
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
    shortlist: int | None = None,
    cache_dir: Path | None = None,
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
        shortlist: retrieval scores exactly only this many candidates per image and per caption; None: every pair.
        cache_dir: folder of class text features, for weights that are evaluated again; None: none are kept.
        on_result: called on every process after each task.
        progress: show progress bars (on the first process).

    Raises:
        UserError: an unknown task or prompt ensemble, or a shortlist too short for the recalls.
    """
    if shortlist is not None and shortlist < retrieval.DEPTH:
        raise UserError(f"shortlist = {shortlist}; expected at least {retrieval.DEPTH}, for R@{retrieval.DEPTH}")
    if prompt_ensemble not in PROMPT_ENSEMBLES:
        raise UserError(f"prompt_ensemble = {prompt_ensemble!r}.{did_you_mean(prompt_ensemble, PROMPT_ENSEMBLES)}")
    device = torch.device(device)
    scorer = Scorer(model, preprocess, tokenizer, device, autocast_dtype)
    cache = TextCache.open(cache_dir, model) if cache_dir is not None else None
    run = _Run(scorer, Processes.of_group(device), batch_size, workers, prompt_ensemble, shortlist, cache, progress)
    results = []
    with _evaluating(model, device):
        for entry in catalog.select(tasks):
            results.append(_evaluate(entry, run))
            if on_result is not None:
                on_result(results[-1])
    return results


@contextmanager
def _evaluating(model: Llip, device: torch.device) -> Iterator[None]:
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
    shortlist: int | None
    cache: TextCache | None
    progress: bool

    @property
    def shows(self) -> bool:
        """Whether this process shows progress bars."""
        return self.progress and self.processes.is_main

    def batches(self, source: ImageSource, task: str) -> Iterator[Batch]:
        """Yield this process's share of the images, with a progress bar on the first process."""
        share = self.processes.share(len(source))
        with tqdm(total=len(share), desc=task, unit="img", disable=not self.shows, leave=False) as bar:
            for batch in image_batches(source, self.scorer.preprocess, share, self.batch_size, self.workers):
                yield batch
                bar.update(len(batch.indices) + len(batch.unreadable))


def _evaluate(entry: Entry, run: _Run) -> TaskResult:
    started = time.perf_counter()
    try:
        evaluate = {CLASSIFICATION: _classify, RETRIEVAL: _retrieve}[entry.kind]
        outcome = evaluate(entry, run)
    except TaskError as error:
        outcome = {"error": str(error)}
    elapsed = time.perf_counter() - started
    seconds = max(gather_from_all(run.processes, lambda: elapsed))
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
        source = open_source(entry)
        labels = labels_of(entry, source)
        check_targets(source, labels)
        if source.multi_label and entry.metric not in MULTI_LABEL:
            fitting = " or ".join(sorted(MULTI_LABEL))
            raise UserError(f"metric {entry.metric!r} is for one class per image, and here are several; use {fitting}")
        return source, labels

    def predict() -> tuple[list[zero_shot.BatchPredictions], list[Unreadable]]:
        predictions, unreadable = [], []
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                check_batch(batch.indices, batch.targets, source, labels)
                predictions.append(
                    zero_shot.predict(scorer, batch, features, _names(source, batch), keep_scores=keep_scores)
                )
        return predictions, unreadable

    keep_scores = entry.metric in NEED_SCORES
    source, labels = run_on_all(processes, prepare)
    features = _class_features(labels, entry.name, run).to(scorer.device)
    shares = gather_from_all(processes, predict)
    batches = [batch for predictions, _ in shares for batch in predictions]
    unreadable = [item for _, items in shares for item in items]
    return {
        **run_on_all(processes, lambda: _scored(entry, source, batches, unreadable, len(labels.classnames))),
        **_skipped(unreadable),
        "classnames_hash": labels.classnames_hash,
        "prompts_hash": labels.prompts_hash,
    }


def _class_features(labels: Labels, task: str, run: _Run) -> Tensor:
    """Return the features [C, Q, D] of all classes, on the CPU: from the cache, else each process encodes its share."""
    processes, count = run.processes, len(labels.classnames)

    def encode() -> Tensor | None:  # [C of this process, Q, D]
        share = processes.share(count)
        title = f"{task}: class names" if run.shows else None
        return zero_shot.class_features(run.scorer, labels, share, run.prompt_ensemble, title).cpu() if share else None

    cache = run.cache
    if cache is not None:
        prompts = [labels.prompts_of(label) for label in range(count)]
        path = run_on_all(processes, lambda: cache.path(run.scorer, prompts, run.prompt_ensemble))
        cached = run_on_all(processes, lambda: cache.load(path, count))
        everywhere = all(gather_from_all(processes, lambda: cached is not None))  # a folder may differ by machine
        if everywhere and cached is not None:
            return cached
    parts = gather_from_all(processes, encode)
    assert parts[0] is not None  # the first process has a share of any number of classes
    features = torch.empty(count, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        features[rank :: processes.world_size] = part if part is not None else 0
    if cache is not None and processes.is_main:
        cache.store(path, features)
    return features


def _scored(
    entry: Entry,
    source: ImageSource,
    batches: list[zero_shot.BatchPredictions],
    unreadable: list[Unreadable],
    classes: int,
) -> dict[str, Any]:
    """Compute the metric from everyone's predictions."""
    if not batches:
        _raise_all_unreadable(unreadable)
    indices = torch.cat([batch.indices for batch in batches])
    order = indices.argsort()
    assert len(indices.unique()) == len(indices), "an image was scored twice"

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])[order]

    labels, top, margin = joined("labels"), joined("top"), joined("margin")
    scores = None if batches[0].scores is None else joined("scores")
    truth = None if batches[0].truth is None else joined("truth")
    value = METRICS[entry.metric](Predictions(labels, top, margin, classes, scores, truth))
    hits = top == labels[:, None]
    ranks = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), zero_shot.TOP)
    names = [source.name(index) for index in indices[order].tolist()]
    targets = labels.tolist() if truth is None else [row.nonzero()[:, 0].tolist() for row in truth]
    outcomes = Outcomes(hash_samples(names, targets), _bytes(ranks), labels.to(torch.int32).numpy())
    return {"values": {entry.metric: value}, "n": len(indices), "samples": outcomes.samples, "outcomes": outcomes}


def _names(source: ImageSource, batch: Batch) -> Callable[[int], str]:
    return lambda row: f"image {source.name(batch.indices[row])}"


def _bytes(ranks: Tensor) -> np.ndarray:
    return ranks.to(torch.uint8).numpy()


def _retrieve(entry: Entry, run: _Run) -> dict[str, Any]:
    """Return the fields of a retrieval task's result."""
    processes, scorer = run.processes, run.scorer

    def encode() -> tuple[Tensor, list[int], list[tuple[str, ...]], list[Unreadable]]:
        tokens, indices, captions, unreadable = [], [], [], []
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                tokens.append(scorer.encode_images(batch.images, _names(source, batch)))
                indices += batch.indices
                captions += batch.targets
        return torch.cat(tokens) if tokens else torch.empty(0), indices, captions, unreadable

    def encode_captions() -> tuple[Tensor | None, list[int], list[str]]:
        texts = [text for own in captions for text in own]
        owners = [index for index, own in zip(indices, captions, strict=True) for _ in own]
        return scorer.encode_texts(texts).cpu() if texts else None, owners, texts

    source = run_on_all(processes, lambda: open_source(entry))
    h, indices, captions, mine = run_on_all(processes, encode)  # h [N, K, D]
    unreadable = [item for items in gather_from_all(processes, lambda: mine) for item in items]
    parts = gather_from_all(processes, encode_captions)
    owners = torch.tensor([owner for _, part, _ in parts for owner in part], dtype=torch.int64)  # [T]
    if not len(owners):
        run_on_all(processes, lambda: _raise_all_unreadable(unreadable))
    # captions in the order of their images, so that ties rank the same for any number of processes
    order = owners.argsort(stable=True)
    texts = torch.cat([features for features, _, _ in parts if features is not None])[order]
    strings = [text for _, _, part in parts for text in part]
    owners, strings = owners[order], [strings[position] for position in order.tolist()]
    images = torch.tensor(indices, dtype=torch.int64)
    texts = texts.to(scorer.device)
    shortlist = _shortlist(h, images, texts, len(source), run) if run.shortlist is not None else None
    title = f"{entry.name}: scores" if run.shows else None
    shares = gather_from_all(
        processes, lambda: retrieval.score_share(scorer, h, images, texts, owners, shortlist, title)
    )
    ranks = retrieval.join(shares, owners)
    outcomes = run_on_all(processes, lambda: _retrieval_outcomes(source, ranks, owners, strings))
    return {
        "values": retrieval.recalls(ranks),
        "n": len(ranks.images),
        "texts": len(owners),
        "shortlist": run.shortlist,
        "samples": outcomes.samples,
        "outcomes": outcomes,
        **_skipped(unreadable),
        "prompts_hash": hash_texts(strings),
    }


def _shortlist(h: Tensor, images: Tensor, texts: Tensor, count: int, run: _Run) -> Shortlist:
    """Gather the text-independent features of all images, by index, and find the candidates; `h` [N, K, D]."""

    def features() -> tuple[Tensor, Tensor]:
        mine = text_free_features(run.scorer, h).cpu() if len(images) else torch.empty(0, texts.shape[1])
        return images, mine

    shortlist = run.shortlist
    assert shortlist is not None
    parts = gather_from_all(run.processes, features)
    everything = torch.zeros(count, texts.shape[1])
    for indices, part in parts:
        everything[indices] = part
    scored = torch.cat([indices for indices, _ in parts]).sort().values
    return run_on_all(
        run.processes, lambda: Shortlist.of(everything.to(texts.device), scored.to(texts.device), texts, shortlist)
    )


def _retrieval_outcomes(source: ImageSource, ranks: retrieval.Ranks, owners: Tensor, captions: list[str]) -> Outcomes:
    names = [source.name(index) for index in ranks.images.tolist()]
    positions = torch.searchsorted(ranks.images, owners)
    samples = hash_samples([*names, *captions], [*[None] * len(names), *positions.tolist()])
    return Outcomes(
        samples,
        _bytes(ranks.image_to_text),
        text_ranks=_bytes(ranks.text_to_image),
        owners=positions.to(torch.int32).numpy(),
    )


def _raise_all_unreadable(unreadable: list[Unreadable]) -> None:
    first = min(unreadable, key=lambda item: item.index)
    raise UserError(f"none of {len(unreadable)} images can be read; the first is {first.name}: {first.reason}")


def _skipped(unreadable: list[Unreadable]) -> dict[str, Any]:
    ordered = sorted(unreadable, key=lambda item: item.index)
    named = tuple(f"{item.name}: {item.reason}" for item in ordered[:NAMED_UNREADABLE])
    return {"skipped": len(ordered), "skipped_images": named}
