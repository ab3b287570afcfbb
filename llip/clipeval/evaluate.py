"""Evaluate a model on the tasks of a catalog: in one process, or on all those of an initialised process group.

Each image is scored once, on one process; results are gathered exactly and are the same on every process.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.classification import classify
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.loading import Preprocess
from llip.clipeval.metrics import CLASSIFICATION, RETRIEVAL
from llip.clipeval.retrieval import retrieve
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_result import TaskResult
from llip.clipeval.task_run import TaskError, TaskRun
from llip.clipeval.texts.cache import TextCache
from llip.open_clip.model import Llip
from llip.system.processes import Processes


def evaluate_tasks(
    model: Llip,
    entries: Sequence[Entry],
    config: EvalConfig,
    *,
    device: torch.device | str,
    preprocess: Preprocess | None = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    autocast_dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
    on_result: Callable[[TaskResult], None] | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Evaluate `model` on tasks; with a process group, all its processes must make the same call.

    A task that cannot be evaluated gives a result with an error, and the others run. The modules' modes and the random
    state are restored.

    Args:
        model: answers encode_image, encode_text and similarity as `llip.open_clip.model.Llip` does; on `device`, not
            wrapped in DDP.
        entries: the tasks, of a catalog.
        config: gives batch_size and workers (per process of the group), prompt_ensemble and shortlist.
        preprocess: PIL image -> normalised tensor [3, H, W]; None: `model.preprocess_val`.
        tokenizer: texts -> token ids [T, context]; None: `model.tokenizer`.
        cache_dir: folder that keeps class text features, for weights that are evaluated again; None: no cache.
        on_result: called on every process after each task.
        progress: show progress bars (on the first process).
    """
    device = torch.device(device)
    scorer = Scorer(model, preprocess or model.preprocess_val, tokenizer or model.tokenizer, device, autocast_dtype)
    cache = TextCache.open(cache_dir, model) if cache_dir is not None else None
    run = TaskRun(scorer, config, Processes.of_group(device), cache, progress)
    results = []
    with _evaluating(model, device):
        for entry in entries:
            results.append(_evaluate(entry, run))
            if on_result is not None:
                on_result(results[-1])
    return results


@contextmanager
def _evaluating(model: Llip, device: torch.device) -> Iterator[None]:
    """Eval mode and no gradients; modes and random state are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = [device] if device.type == "cuda" else []
    try:
        # no_grad, not inference_mode: what a model caches here must stay usable in training
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
