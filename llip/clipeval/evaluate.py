"""Evaluate a model on the tasks of a catalog: alone, or on every process of an initialised process group.

Each image is scored once, on one process; results are gathered exactly and are the same on every process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llip.clipeval.catalog.catalog import Catalog, Entry
from llip.clipeval.classification import classify
from llip.clipeval.loading import Preprocess
from llip.clipeval.metrics import CLASSIFICATION, RETRIEVAL
from llip.clipeval.retrieval import DEPTH, retrieve
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_result import TaskResult
from llip.clipeval.task_run import TaskError, TaskRun
from llip.clipeval.texts.cache import TextCache
from llip.clipeval.texts.classifier import PROMPT_ENSEMBLES
from llip.errors import UserError, did_you_mean
from llip.open_clip.model import Llip
from llip.system.processes import Processes


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
    if shortlist is not None and shortlist < DEPTH:
        raise UserError(f"shortlist = {shortlist}; expected at least {DEPTH}, for R@{DEPTH}")
    if prompt_ensemble not in PROMPT_ENSEMBLES:
        raise UserError(f"prompt_ensemble = {prompt_ensemble!r}.{did_you_mean(prompt_ensemble, PROMPT_ENSEMBLES)}")
    device = torch.device(device)
    scorer = Scorer(model, preprocess, tokenizer, device, autocast_dtype)
    cache = TextCache.open(cache_dir, model) if cache_dir is not None else None
    run = TaskRun(scorer, Processes.of_group(device), batch_size, workers, prompt_ensemble, shortlist, cache, progress)
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


def _evaluate(entry: Entry, run: TaskRun) -> TaskResult:
    started = time.perf_counter()
    try:
        outcome = {CLASSIFICATION: classify, RETRIEVAL: retrieve}[entry.kind](entry, run)
    except TaskError as error:
        outcome = {"error": str(error)}
    seconds = max(run.processes.all_gather_object(time.perf_counter() - started))
    return TaskResult(
        task=entry.name,
        metric=entry.metric,
        seconds=seconds,
        images_per_second=outcome.get("n", 0) / seconds,
        fingerprint=entry.fingerprint,
        **outcome,
    )
