"""Recompute a bad step: `llip replay <run>/nan_dumps/step_<N> [--device cpu] [--json]`.

The parts of all processes are joined in this one, which gives the same loss over all images and texts. Reports whether
the numbers are not finite again, in which module first, and for which samples. A user's pooling or objective is read
from its file, or from the run's copy of it.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llip.configs import Config, config_fields
from llip.data.loader import MicroBatch
from llip.errors import UserError
from llip.extensions import FOLDER, relocate
from llip.open_clip.factory import create_model, model_spec
from llip.open_clip.model import autocast_dtype
from llip.open_clip.weights.load import load_weights, read_checkpoint
from llip.system.processes import Processes
from llip.system.program import program
from llip.training.debug.nan_dump import FORMAT, norms, plain
from llip.training.step.accumulation import RandomState, backward_step
from llip.training.step.task import ContrastiveTask

_SHOWN = 8


@dataclasses.dataclass
class FirstTrouble:
    """The first module of a forward pass that gave a value that is not finite."""

    module: str = ""
    samples: tuple[int, ...] = ()  # their numbers in the slice


def read_record(folder: Path) -> dict[str, Any]:
    """Return `record.json` of a nan dump.

    Raises:
        UserError: there is none, or it is of another version.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text())
        written = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(folder)!r} is no nan dump ({type(error).__name__}: {error}); expected <run>/nan_dumps/step_<N>"
        ) from error
    if written != FORMAT:
        raise UserError(f"nan dump {str(path)!r} has format {written!r}, expected {FORMAT}")
    return record


def read_config(fields: dict[str, Any]) -> Config:
    """Return the config of a record, without fields that this version does not have."""
    known = {name: value for name, value in fields.items() if name in config_fields()}
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in known.items()}
    return Config(**values)


def read_parts(folder: Path, processes: int, device: torch.device) -> tuple[list[MicroBatch], list[RandomState | None]]:
    """Return the micro-batches of all processes by rank, and the random state of each where it is known."""
    slices: list[MicroBatch] = []
    states: list[RandomState | None] = []
    for rank in range(processes):
        part = read_checkpoint(folder / f"process_{rank}.pt")
        for index, parts in enumerate(part["slices"]):
            slices.append(_micro_batch(*(part.to(device) for part in parts)))
            states.append((part["rng"], part["cuda_rng"]) if index == 0 else None)  # those of the next ones follow
    return slices, states


def _micro_batch(images: Tensor, tokens: Tensor, mask: Tensor | None = None) -> MicroBatch:
    """Return a micro-batch of a dump; until 0.1 it had one caption per image: tokens [B, C] and no mask."""
    if mask is None:
        tokens = tokens[:, None]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return MicroBatch(images, tokens, mask)


@contextmanager
def first_trouble(model: nn.Module) -> Iterator[FirstTrouble]:
    """Yield what becomes the first module whose output is not finite although its inputs are."""
    trouble = FirstTrouble()

    def look(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        if trouble.module or any(len(_bad(value)) for value in _tensors(inputs)):
            return
        for value in _tensors(output):
            if len(bad := _bad(value)):
                trouble.module, trouble.samples = name, tuple(bad.tolist())
                return

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        yield trouble
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _bad(value: Tensor) -> Tensor:
    """Return the indices along the first dimension of `value` at which something is not finite."""
    if not value.is_floating_point() or not value.ndim:
        return torch.empty(0, dtype=torch.long)
    return (~value.detach().isfinite().flatten(1).all(dim=1) if value.ndim > 1 else ~value.isfinite()).nonzero()[:, 0]


def bad_samples(
    task: ContrastiveTask, slices: list[MicroBatch], autocast: Any, keys: list[list[str]]
) -> dict[str, Any]:
    """Return the modules first in trouble, by micro-batch, and the samples whose features are not finite."""
    modules: dict[str, int] = {}
    samples: list[str] = []
    for (images, tokens, _), names in zip(slices, keys, strict=True):
        with torch.no_grad(), autocast(), first_trouble(task.model) as trouble:
            h, t = task.encode(images, tokens)
            t = t.unflatten(0, tokens.shape[:2])  # [B, N, D]
        if trouble.module:
            modules[trouble.module] = modules.get(trouble.module, 0) + 1
        samples += [names[index] for index in sorted({*_bad(h).tolist(), *_bad(t).tolist()})]
    return {"first_modules": modules, "samples_without_finite_features": samples}


def replay(folder: Path, device: torch.device) -> dict[str, Any]:
    """Recompute the step of the nan dump in `folder`, and return plain values.

    Raises:
        UserError: the dump is missing or damaged, or a user's file is missing.
    """
    record = read_record(folder)
    fields = record["config"]
    config = read_config(fields | relocate(fields, folder.absolute().parent.parent / FOLDER))
    model = create_model(model_spec(config))
    load_weights(model, read_checkpoint(folder / "model.pt"), "the nan dump")
    model.to(device).train()
    slices, states = read_parts(folder, record["processes"], device)
    keys = [ids for process in record["samples"] for ids in process]
    dtype = autocast_dtype(config.precision)
    autocast = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype)
    task = ContrastiveTask(model, config, Processes(0, 1, device))
    samples = bad_samples(task, slices, autocast, keys)
    scale = float(record["loss_scale"])
    loss, _ = backward_step(task, slices, autocast, lambda value: value * scale, states)
    gradients = norms({name: None if p.grad is None else p.grad / scale for name, p in model.named_parameters()})
    norm = math.sqrt(sum(value**2 for value in gradients.values()))
    recorded = [float(value) for value in record["losses"]]
    return {
        "step": record["step"],
        "recorded_loss": sum(recorded) / len(recorded),
        "recorded_grad_norm": float(record["grad_norm"]),
        "loss": loss.item(),
        "grad_norm": norm,
        "reproduced": not (math.isfinite(loss.item()) and math.isfinite(norm)),
        **samples,
        "gradient_norms": dict(list(gradients.items())[:_SHOWN]),
    }


def describe(result: dict[str, Any]) -> str:
    """Return the result of a replay for people."""
    samples = result["samples_without_finite_features"]
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    modules = ", ".join(f"{name} (in {count} slices)" for name, count in result["first_modules"].items())
    norm_lines = "\n".join(f"  {value:12.4g}  {name}" for name, value in result["gradient_norms"].items())
    return (
        f"step {result['step']}: loss {result['loss']:.6g} (recorded {result['recorded_loss']:.6g}), gradient norm "
        f"{result['grad_norm']:.6g} (recorded {result['recorded_grad_norm']:.6g})\n"
        + ("not finite again\n" if result["reproduced"] else "all numbers are finite here\n")
        + f"first module whose output is not finite: {modules or 'none'}\n"
        f"samples without finite features: {', '.join(samples[:_SHOWN]) or 'none'}{more}\n"
        f"largest gradient norms:\n{norm_lines}"
    )


@program
def main(arguments: Sequence[str]) -> None:
    """Replay a dump and print the result."""
    parser = argparse.ArgumentParser(prog="llip replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="the nan dump, <run>/nan_dumps/step_<N>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead")
    given = parser.parse_args(arguments)
    result = replay(given.folder, torch.device(given.device))
    print(json.dumps(plain(result)) if given.json else describe(result))


if __name__ == "__main__":
    sys.exit(main())
