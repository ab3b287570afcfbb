"""Compare results: `llip compare A B ... [--json] [--out DIR]`.

A, B, ... are results.json files or their folders; each value of B, ... is compared with that of A. A difference has a
95 % bootstrap interval over images where both sides kept per-sample outcomes: paired if they scored the same images in
the same order, independent otherwise. The interval is about the choice of test images; it does not cover training
seeds. In the interval of the mean, tasks are drawn independently: tasks that share images make it too narrow or wide.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evals.bootstrap import Interval, difference_draws, interval
from evals.chart import bar_chart
from evals.results import StoredResults, read_results
from llip.clipeval.outcomes import Parts, load_outcomes, outcomes_file, parts_of
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.errors import UserError
from llip.system.files import write_text
from llip.system.program import program
from llip.system.tables import aligned_table, markdown_table


@dataclass(frozen=True)
class Difference:
    """A value of one side, and how it differs from the first side's, in fractions.

    Attributes:
        difference: this side's minus the first side's.
        interval: of the difference; None where `note` gives the reason.
        paired: both sides scored the same images in the same order; None without an interval.
        note: a caveat, or None.
    """

    value: float
    difference: float
    interval: Interval | None = None
    paired: bool | None = None
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One value of one task (`mean`: over the common classification tasks) on all sides."""

    task: str
    metric: str
    first: float
    others: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """All differences, and for each side its tasks that another side lacks."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: dict[str, tuple[str, ...]]

    def to_json(self) -> dict:
        """Return plain objects; values are fractions."""
        return asdict(self)


def compare(sides: Sequence[StoredResults], seed: int = 0) -> Comparison:
    """Compare every other side with the first.

    Raises:
        UserError: the sides have no task in common.
    """
    good = [{task: result for task, result in side.tasks.items() if not result.error} for side in sides]
    common = [task for task in good[0] if all(task in tasks for tasks in good)]
    common = [task for task in common if len({tasks[task].metric for tasks in good}) == 1]
    if not common:
        raise UserError(f"{' and '.join(side.name for side in sides)} have no task in common (same name and metric)")
    rows, draws = [], []
    for task in common:
        for name in [value for value in good[0][task].values if all(value in tasks[task].values for tasks in good)]:
            pairs = [_difference(sides[0], side, task, name, seed) for side in sides[1:]]
            rows.append(Row(task, name, good[0][task].values[name], tuple(pair[0] for pair in pairs)))
            if name == good[0][task].metric:
                draws.append([pair[1] for pair in pairs])
    means = [classification_mean([tasks[task] for task in common]) for tasks in good]
    known = [mean for mean in means if mean is not None]
    if len(known) == len(means):
        rows.append(_mean_row(known, draws))
    left_out = {
        side.name: tuple(task for task in side.tasks if task not in common)
        for side in sides
        if set(side.tasks) - set(common)
    }
    return Comparison(tuple(side.name for side in sides), tuple(rows), left_out)


def _mean_row(means: list[float], draws: list[list[np.ndarray | None]]) -> Row:
    """Return the means over tasks, given the resampled differences [tasks][others]."""
    others = []
    for mean, drawn in zip(means[1:], zip(*draws, strict=True), strict=True):
        known = [draw for draw in drawn if draw is not None]
        complete = len(known) == len(drawn)
        bounds = interval(np.mean(known, axis=0)) if complete else None
        note = None if complete else f"{len(drawn) - len(known)} of {len(drawn)} tasks have no interval"
        others.append(Difference(mean, mean - means[0], bounds, None, note))
    return Row("mean", f"of {len(draws)} classification tasks", means[0], tuple(others))


def _difference(
    first: StoredResults, side: StoredResults, task: str, name: str, seed: int
) -> tuple[Difference, np.ndarray | None]:
    """Return the difference of one value, and its resamples."""
    before, after = first.tasks[task], side.tasks[task]
    value, notes = after.values[name], []
    if (before.classnames_hash, before.prompts_hash) != (after.classnames_hash, after.prompts_hash):
        notes.append("different class names, prompts or captions")
    if before.shortlist != after.shortlist:
        notes.append(
            "only one is by shortlist"
            if None in (before.shortlist, after.shortlist)
            else "shortlists of different lengths"
        )
    (parts_before, why_before), (parts_after, why_after) = _parts(first, before, name), _parts(side, after, name)
    if parts_before is None or parts_after is None:
        reasons = [f"{why} ({name})" for name, why in ((first.name, why_before), (side.name, why_after)) if why]
        note = "; ".join([*notes, "no interval: " + ", ".join(reasons)])
        return Difference(value, value - before.values[name], note=note), None
    paired = before.samples == after.samples
    if not paired:
        notes.append("not the same images")
    draws = difference_draws(parts_before, parts_after, paired=paired, seed=seed, name=task)
    return Difference(value, value - before.values[name], interval(draws), paired, "; ".join(notes) or None), draws


def _parts(side: StoredResults, result: TaskResult, name: str) -> tuple[Parts | None, str | None]:
    """Return the value as a sum over images, or the reason why it is none."""
    outcomes = load_outcomes(outcomes_file(side.path, result.task))
    if result.samples is None or outcomes is None:
        return None, "no per-sample outcomes"
    parts = parts_of(outcomes, name)
    if parts is None:
        return None, f"{name} is not a mean over images"
    if outcomes.samples != result.samples or abs(parts.value() - result.values[name]) > 1e-9:
        return None, "the per-sample outcomes are of another run"
    return parts, None


def as_table(comparison: Comparison, markdown: bool = False) -> str:
    """Return the comparison in percent, with its notes and the tasks that were not compared."""
    letters = [chr(ord("A") + index) for index in range(len(comparison.names))]
    head, body, notes = ["task", "value", "A"], [], []
    for letter in letters[1:]:
        head += [letter, f"{letter} - A", "95 % interval"]
    for row in comparison.rows:
        cells = [row.task, row.metric, f"{100 * row.first:.1f}"]
        for letter, other in zip(letters[1:], row.others, strict=True):
            bounds = other.interval
            shown = f"{100 * bounds.low:+.1f} .. {100 * bounds.high:+.1f}" if bounds else "-"
            cells += [f"{100 * other.value:.1f}", f"{100 * other.difference:+.1f}", shown]
            if other.note:
                notes.append(f"{letter}, {row.task}, {row.metric}: {other.note}")
        body.append(cells)
    legend = [f"{letter}: {name}" for letter, name in zip(letters, comparison.names, strict=True)]
    notes += [f"{name}: not compared: {', '.join(tasks)}" for name, tasks in comparison.left_out.items()]
    if markdown:
        lists = ["\n".join(f"- {line}" for line in lines) for lines in (legend, notes) if lines]
        return "\n\n".join([lists[0], markdown_table([head, *body]), *lists[1:]])
    return "\n".join([*legend, "", aligned_table([head, *body]), *notes])


def write_files(comparison: Comparison, folder: Path) -> None:
    """Write compare.json, compare.md and compare.png into `folder`, created if missing."""
    labels = [row.task if row.metric in ("top1", "mean") else f"{row.task} {row.metric}" for row in comparison.rows]
    sides = {f"A: {comparison.names[0]}": [100 * row.first for row in comparison.rows]}
    for place, name in enumerate(comparison.names[1:]):
        sides[f"{chr(ord('B') + place)}: {name}"] = [100 * row.others[place].value for row in comparison.rows]
    text = f"# Comparison of zero-shot results, in percent\n\n{as_table(comparison, markdown=True)}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "compare.json", json.dumps(comparison.to_json(), indent=2) + "\n")
        write_text(folder / "compare.md", text)
        bar_chart(folder / "compare.png", "Zero-shot results", labels, sides, {})
    except (OSError, ValueError) as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from error


@program
def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="llip compare", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.json files or their folders; first: A")
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    parser.add_argument("--out", metavar="DIR", help="folder for compare.json, compare.md and compare.png")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap [0]")
    arguments = parser.parse_args(argv)
    if not 2 <= len(arguments.results) <= 26:
        raise UserError(f"{len(arguments.results)} results to compare; expected 2 to 26 files or folders")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}; expected an integer, at least 0")
    comparison = compare([read_results(path) for path in arguments.results], arguments.seed)
    if arguments.out:
        write_files(comparison, Path(arguments.out))
    print(json.dumps(comparison.to_json()) if arguments.json else as_table(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
