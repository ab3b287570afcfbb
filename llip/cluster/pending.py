"""Weights to be evaluated in another job: `<run>/evaluating/step_<N>-<name>.pt`.

A run that resumes from an earlier step removes the files of later steps, and a job that is evaluating one of them then
discards its results: `evals.jsonl` has one line for each step and task.
"""

import logging
import re
import uuid
from pathlib import Path
from typing import Any

from llip.clipeval.catalog.catalog import load_evaluation
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.task_result import TaskResult
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import load_pretrained
from llip.open_clip.model import Llip, autocast_dtype
from llip.system.files import atomic_write
from llip.system.processes import Processes
from llip.training.checkpoints.checkpoint import FORMAT, save_tensors
from llip.training.checkpoints.records import (
    EVALS,
    BestEffort,
    append_record,
    keep_records,
    locked_evaluations,
    read_records,
)
from llip.training.distributed.launch import report_error, resolve_device
from llip.training.distributed.processes import join_processes
from llip.training.evaluation import report_result
from llip.training.reporting.run_log import log, start_logging


def save_for_eval(run: Path, model: Llip, step: int) -> Path:
    """Write a model's weights for a job that evaluates them, and remove those of this step and of later ones.

    Later ones exist if the run was resumed from an earlier step.

    Args:
        run: the run's folder.
        model: after `step`.
        step: of the run.

    Returns:
        The file, a checkpoint without the optimizer, under a name that is used once.

    Raises:
        OSError: the disk cannot take it.
    """
    folder = run / "evaluating"
    folder.mkdir(parents=True, exist_ok=True)
    with locked_evaluations(run):
        for path in folder.glob("step_*.pt"):
            match = re.fullmatch(r"step_(\d+)-\w+\.pt", path.name)
            if match and int(match[1]) >= step:
                path.unlink(missing_ok=True)
    target = folder / f"step_{step}-{uuid.uuid4().hex[:8]}.pt"
    content = {"format": FORMAT, "step": step, "model": model.config, "state_dict": model.state_dict()}
    with atomic_write(target) as temporary:
        save_tensors(content, temporary)
    return target


def evaluate_saved(config: Config, weights: Path) -> int:
    """Evaluate saved weights, add the results to the run's records, and remove the file. Call it on all processes.

    Args:
        config: the run's, with the nodes and ngpus of the evaluation.
        weights: the file of `save_for_eval`.

    Returns:
        The exit code: 0, 1 if a task could not be evaluated, 2 for a mistake in the request.
    """
    try:
        with join_processes(config, resolve_device(config)) as processes:
            start_logging(None)
            log.setLevel(logging.INFO if processes.is_main else logging.WARNING)
            if not processes.broadcast_object(weights.is_file()):
                log.info("%s is gone: the run was resumed from an earlier step, or it has been evaluated", weights)
                return 0
            failed = _evaluate_file(config, weights, processes)
            if processes.is_main:
                weights.unlink(missing_ok=True)
            return 1 if failed else 0
    except UserError as error:
        return report_error(error)


def _evaluate_file(config: Config, weights: Path, processes: Processes) -> bool:
    """Evaluate and record; return whether a task could not be evaluated."""
    step = int(weights.name.removeprefix("step_").partition("-")[0])
    model = load_pretrained(weights).to(processes.device)
    dtype = autocast_dtype(config.precision)
    failed = False
    for evaluation, entries in map(load_evaluation, config.evals):
        for result in evaluate_tasks(model, entries, evaluation, device=processes.device, autocast_dtype=dtype):
            if not report_result(result, step):
                failed = True
            elif processes.is_main and add_evaluation(config.folder, weights, step, result):
                _draw(config, step, result)
    return failed


def add_evaluation(folder: Path, weights: Path, step: int, result: TaskResult) -> bool:
    """Add a job's result to the run's `evals.jsonl`, replacing an earlier one of the same step and task.

    Returns:
        Whether it was added; not if `weights` is gone, because the run was resumed from an earlier step.

    Raises:
        OSError: the disk cannot take it, or another process holds the records for too long.
    """
    record = {"step": step, "task": result.task, "values": result.values}
    path = folder / EVALS
    with locked_evaluations(folder):
        if not weights.is_file():
            return False
        if any(_same(other, record) for other in read_records(path)):
            keep_records(path, lambda other: not _same(other, record), more=record)
        else:
            append_record(path, record)
    return True


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two records are of the same step and task."""
    return (one["step"], one.get("task")) == (other["step"], other.get("task"))


def _draw(config: Config, step: int, result: TaskResult) -> None:
    if "tensorboard" not in config.report_to:
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = config.folder / "tensorboard"
    with BestEffort(str(folder)).allowed(), SummaryWriter(folder) as board:  # the result is recorded already
        for name, value in result.values.items():
            board.add_scalar(f"eval/{result.task}/{name}", value, step)
