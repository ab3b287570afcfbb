"""Variants of one config, trained over seeds and evaluated alike: what the ladder and the ablations share.

Finished runs are not repeated and interrupted ones are resumed; results of another config are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llip.cluster.snapshot import frozen_config
from llip.configs import IDENTITY, Config, config_fields
from llip.errors import UserError
from llip.system.files import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#64748b", "#c2410c", "#0d9488", "#7c3aed", "#ca8a04", "#be185d")

RESULT = "benchmark.json"
"""File of a run's folder that holds its result and the values it belongs to."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config and its name in tables and figures."""

    label: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained variant: its values (fractions) by column, and the seconds of its training if it was not resumed."""

    variant: str
    seed: int
    values: dict[str, float]
    train_seconds: float | None


def parse_sweep(parser: argparse.ArgumentParser, arguments: Sequence[str], logs: str) -> argparse.Namespace:
    """Read a command line with the options of every sweep behind those of the parser."""
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of every config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--logs", type=Path, default=Path(logs), help="folder of the runs [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    return parser.parse_intermixed_args(arguments)


def run_variants(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    logs: Path,
    prefix: str,
    evaluate_run: Callable[[Config], dict[str, float]] | None = None,
) -> list[Result]:
    """Train and evaluate every variant with every seed, into `<logs>/<prefix>_<label>_seed<n>`.

    Args:
        variants: what is trained.
        seeds: of each variant.
        logs: folder of the runs.
        prefix: of their names.
        evaluate_run: returns the values of a finished run; None: those of the tasks that its `evals` name.

    Raises:
        UserError: `logs` holds results of another config.
        RuntimeError: a run failed, or could not be evaluated.
    """
    for variant in variants:
        for seed in seeds:
            read_result(_config(variant, seed, logs, prefix))  # complain before hours of training
    return [
        _run(_config(variant, seed, logs, prefix), variant.label, evaluate_run or evaluate)
        for seed in seeds
        for variant in variants
    ]


def _config(variant: Variant, seed: int, logs: Path, prefix: str) -> Config:
    label = variant.label.replace(" = ", "").replace(", ", "_").replace("+ ", "").replace(" ", "_")
    return variant.config.replace(
        name=f"{prefix}_{label}_seed{seed}", logs=str(logs), seed=seed, eval_steps=0, save_frequency=0
    )


def _run(config: Config, label: str, evaluate_run: Callable[[Config], dict[str, float]]) -> Result:
    finished = read_result(config)
    if finished is not None:
        return dataclasses.replace(finished, variant=label)
    resumed = (config.folder / "checkpoints").is_dir()  # the time of its earlier starts is not known
    started = time.monotonic()
    train(config)
    seconds = None if resumed else time.monotonic() - started
    result = Result(label, config.seed, evaluate_run(config), seconds)
    write_result(config, result)
    return result


def result_identity(config: Config) -> dict[str, Any]:
    """Return what a result depends on: identity fields, the global batch instead of its factors, the tasks."""
    fields = [name for name, field in config_fields().items() if field.metadata["kind"] == IDENTITY]
    values = {name: getattr(config, name) for name in fields}
    return values | {"global batch": config.global_batch, "evals": list(config.evals)}


def write_result(config: Config, result: Result) -> None:
    """Keep a run's result in its folder, beside what it depends on."""
    write_json(config.folder / RESULT, dataclasses.asdict(result) | {"config": result_identity(config)})


def read_result(config: Config) -> Result | None:
    """Return the result of a finished run; None where there is none.

    Raises:
        UserError: the result is of another config, or does not name it.
    """
    path = config.folder / RESULT
    if not path.is_file():
        return None
    fix = "choose another folder with --logs"
    try:
        content = json.loads(path.read_text())
        before = content.pop("config")
        result = Result(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not name the config of its result ({error!r}); {fix}, or remove it to evaluate the run again"
        ) from error
    now = result_identity(config)
    changed = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(f"{path} is the result of another config ({'; '.join(changed)}); {fix}")
    return result


def train(config: Config) -> None:
    """Train as `python -m llip.main` would, on as many processes as the config asks for.

    Raises:
        RuntimeError: the run failed.
    """
    from llip.main import launch

    file = config.folder / "sweep_config.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(frozen_config(config, "run"))
    code = launch(config, [f"{file}:run"])
    if code:
        raise RuntimeError(f"run {config.folder} ended with exit code {code}")


def evaluate(config: Config) -> dict[str, float]:
    """Return the values of a finished run on the tasks that its `evals` name, by `task metric`."""
    import torch

    import llip
    from llip.clipeval.catalog.catalog import load_evaluation
    from llip.clipeval.evaluate import evaluate_tasks

    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt").to(device)
    values: dict[str, float] = {}
    for evaluation, entries in map(load_evaluation, config.evals):
        for result in evaluate_tasks(model, entries, evaluation, device=device):
            if result.error:
                raise RuntimeError(f"task {result.task}: {result.error}")
            values |= {f"{result.task} {name}": value for name, value in result.values.items()}
    return values


def table(results: Sequence[Result], columns: dict[str, str]) -> str:
    """Return a Markdown table: a row per variant, mean and range over seeds in percent.

    Args:
        results: of all variants and seeds; the time of those that were resumed is not known.
        columns: head of the column -> key of `Result.values`.
    """
    lines = ["| | " + " | ".join(columns) + " | training s |", "|---" * (len(columns) + 2) + "|"]
    for label in dict.fromkeys(result.variant for result in results):
        runs = [result for result in results if result.variant == label]
        cells = []
        for key in columns.values():
            values = [100 * result.values[key] for result in runs]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        known = [result.train_seconds for result in runs if result.train_seconds is not None]
        seconds = f"{statistics.mean(known):.0f}" if known else "-"
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # slow to import

    columns, rows = min(3, count), -(-count // 3)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes)[:count]


def draw_bars(results: Sequence[Result], columns: dict[str, str], marked: str, path: Path) -> None:
    """Draw a panel per column: a bar per variant, a dot per seed; the `marked` variant in another colour."""
    figure, axes = _panels(len(columns))
    labels = list(dict.fromkeys(result.variant for result in results))
    for axis, (head, key) in zip(axes, columns.items(), strict=True):
        for position, label in enumerate(labels):
            values = [100 * result.values[key] for result in results if result.variant == label]
            color = "#c2410c" if label == marked else "#94a3b8"
            axis.bar(position, statistics.mean(values), color=color, zorder=2)
            axis.scatter([position] * len(values), values, color="black", s=12, zorder=3)
        axis.set_title(f"{head}, %", fontsize=10)
        axis.set_xticks(range(len(labels)), labels, rotation=20, fontsize=8)
        axis.grid(axis="y", alpha=0.3, zorder=0)
    figure.savefig(path, dpi=100)


def draw_curves(results: Sequence[Result], columns: dict[str, str], label: str, path: Path) -> None:
    """Draw a panel per column over a quantity: mean over seeds, its standard deviation as error bars, a dot per seed.

    Args:
        results: whose variants are labelled `<name> = <number>`, or `<series>, <name> = <number>` for several curves.
        columns: head of the panel -> key of `Result.values`.
        label: of the horizontal axis.
        path: of the picture.
    """
    figure, axes = _panels(len(columns))
    curves: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        name, number = result.variant.split(" = ")
        curve = curves.setdefault(name.rpartition(", ")[0], {})
        curve.setdefault(float(number), []).append(result)
    numbers = sorted({number for curve in curves.values() for number in curve})
    for axis, (head, key) in zip(axes, columns.items(), strict=True):
        for (name, curve), color in zip(curves.items(), itertools.cycle(_COLORS)):
            values = {number: [100 * result.values[key] for result in curve[number]] for number in sorted(curve)}
            means = [statistics.mean(each) for each in values.values()]
            spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values.values()]
            axis.errorbar(list(values), means, spread, color=color, capsize=3, label=name)
            for number, each in values.items():
                axis.scatter([number] * len(each), each, color=color, s=10, zorder=3)
        axis.set_title(f"{head}, %", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.3)
    if len(curves) > 1:
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def report(results: Sequence[Result], columns: dict[str, str], stem: Path, as_json: bool, **more: Any) -> None:
    """Write `<stem>.md` and `<stem>.json` beside the figure `<stem>.png`, and print one of the two.

    Args:
        results: of all variants and seeds.
        columns: head of the column -> key of `Result.values`.
        stem: path without suffix.
        as_json: print the JSON instead of the table.
        more: goes into the JSON, too.
    """
    text = table(results, columns)
    record = json.dumps(more | {"results": [dataclasses.asdict(result) for result in results]})
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(record + "\n")
    print(record if as_json else f"{text}\n\nfigure: {stem.with_suffix('.png')}")
