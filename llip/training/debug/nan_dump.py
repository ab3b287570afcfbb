"""Dump a step whose numbers are not finite, with all that is needed to recompute it anywhere.

`<run>/nan_dumps/step_<N>/` holds `process_<r>.pt` (the batch and random state of each process), `model.pt` (the weights
before the step) and `record.json` (the config, what was seen, and the keys of the samples).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llip.configs import Config
from llip.data.loader import MicroBatch
from llip.open_clip.model import Llip
from llip.system.processes import Processes
from llip.training.checkpoints.checkpoint import save_tensors
from llip.training.step.accumulation import RandomState

FORMAT = 1
_SHOWN = 5  # parameters and samples that a message names


@dataclasses.dataclass(frozen=True)
class BadStep:
    """One process's part of a step whose loss or gradient is not finite."""

    step: int
    slices: list[MicroBatch]
    ids: list[list[str]]  # `shard/key` of the samples, per slice
    random_state: RandomState  # before the step
    loss: float  # of this process
    grad_norm: float


def norms(parameters: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Return the norm of each tensor by name: those that are not finite first, then the largest first."""
    values = {name: tensor.detach().float().norm().item() for name, tensor in parameters.items() if tensor is not None}
    return dict(sorted(values.items(), key=lambda item: (math.isfinite(item[1]), -item[1], item[0])))


def describe(step: BadStep, model: Llip, by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a bad step as plain values.

    Args:
        step: the main process's part.
        model: with the step's gradients in place.
        by_rank: per process its `loss` and the `samples` of its slices.
    """
    named = dict(model.named_parameters())
    return {
        "step": step.step,
        "losses": [each["loss"] for each in by_rank],
        "grad_norm": step.grad_norm,
        "logit_scale": model.logit_scale.exp().item(),
        "gradient_norms": norms({name: p.grad for name, p in named.items()}),
        "weight_norms": norms(named),
        "samples": [each["samples"] for each in by_rank],
    }


def summary(report: dict[str, Any]) -> str:
    """Return one sentence about a bad step."""
    bad = [rank for rank, loss in enumerate(report["losses"]) if not math.isfinite(loss)]
    where = f"loss not finite on processes {', '.join(map(str, bad))}" if bad else "every loss is finite"
    rank = bad[0] if bad else 0
    keys = [key for ids in report["samples"][rank] for key in ids]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (
        f"step {report['step']}: {where} ({', '.join(f'{loss:.4g}' for loss in report['losses'][:8])}), "
        f"gradient norm {report['grad_norm']:.4g}, logit scale {report['logit_scale']:.4g}; "
        f"largest gradients: {_largest(report['gradient_norms'])}; "
        f"largest weights: {_largest(report['weight_norms'])}; "
        f"samples of process {rank}: {', '.join(keys[:_SHOWN])}{more}"
    )


def _largest(norms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in list(norms.items())[:_SHOWN])


def write_nan_dump(step: BadStep, config: Config, model: Llip, scale: float, processes: Processes) -> str:
    """Write the dump, and return what is known of the step and how to recompute it, on every process. Collective.

    A dump that cannot be written is skipped, and the message says why: the run ends anyway.

    Args:
        step: this process's part.
        config: the run's config.
        model: with the weights before the step, and its gradients.
        scale: of the loss; 1 except in float16.
        processes: of the run.
    """
    folder = config.folder / "nan_dumps" / f"step_{step.step}"
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rng, cuda_rng = step.random_state
        slices = [tuple(part.cpu() for part in micro_batch) for micro_batch in step.slices]
        save_tensors({"slices": slices, "rng": rng, "cuda_rng": cuda_rng}, folder / f"process_{processes.rank}.pt")
    except OSError as error:
        problem = f"process {processes.rank}: {error}"
    by_rank = processes.gather_object({"loss": step.loss, "samples": step.ids, "problem": problem})
    message = None
    if by_rank is not None:
        report = describe(step, model, by_rank)
        problems = [each["problem"] for each in by_rank if each["problem"]]
        try:
            save_tensors({"model": model.config, "state_dict": model.state_dict()}, folder / "model.pt")
            run = {"format": FORMAT, "processes": len(by_rank), "loss_scale": scale, "config": dict(vars(config))}
            (folder / "record.json").write_text(json.dumps(plain(run | report), indent=1))
        except OSError as error:
            problems.append(str(error))
        record = f"nan dump: {folder}; recompute the step with: llip replay {folder}"
        if problems:
            record = f"the nan dump could not be written completely: {'; '.join(problems)}"
        message = f"{summary(report)}; {record}"
    return processes.broadcast_object(message)


def plain(value: Any) -> Any:
    """Return `value` with numbers that JSON does not know as the strings nan, inf and -inf."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
