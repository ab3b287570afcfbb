"""Zero-shot evaluation during training: the same code and the same files as the programs in `evals/`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llip.clipeval.catalog.catalog import Catalog, load_catalog
from llip.clipeval.eval_config import load_eval_config
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.loading import Preprocess
from llip.clipeval.task_result import TaskResult
from llip.open_clip.model import Llip


@dataclass(frozen=True)
class OnlineEval:
    """What to evaluate during training, and how; `batch_size` and `workers` are per process."""

    catalog: Catalog
    tasks: tuple[str, ...]
    batch_size: int
    workers: int
    prompt_ensemble: str
    shortlist: int | None = None


def load_online_eval(path: str | Path) -> OnlineEval:
    """Read an evaluation file for training; its checkpoint, run config, output and cache folders are not used here.

    Raises:
        UserError: as `load_eval_config` and `load_catalog`, and for a task that the catalog does not have.
    """
    config = load_eval_config(path)
    catalog = load_catalog(config.catalog_name)
    tasks = tuple(entry.name for entry in catalog.select(config.tasks))
    return OnlineEval(catalog, tasks, config.batch_size, config.workers, config.prompt_ensemble, config.shortlist)


def evaluate_online(
    model: Llip,
    preprocess: Preprocess,
    tokenizer: Callable[[list[str]], Tensor],
    online: OnlineEval,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
) -> list[TaskResult]:
    """Evaluate the model as it is now, on every process; see `evaluate_tasks`. Call it on all processes alike."""
    return evaluate_tasks(
        model,
        preprocess,
        tokenizer,
        online.tasks,
        online.catalog,
        device=device,
        autocast_dtype=autocast_dtype,
        batch_size=online.batch_size,
        workers=online.workers,
        prompt_ensemble=online.prompt_ensemble,
        shortlist=online.shortlist,
    )
