"""Bar charts of results: one bar per task and side, and lines for reference averages."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llip.system.files import atomic_write

MAX_LABEL = 48  # characters of a name in the legend


def bar_chart(
    path: Path,
    title: str,
    tasks: Sequence[str],
    sides: Mapping[str, Sequence[float | None]],
    lines: Mapping[str, float],
    rules: Sequence[int] = (),
) -> None:
    """Write a png.

    Args:
        tasks: the groups of bars, top to bottom.
        sides: name -> a percentage per task, None if unknown.
        lines: name -> percentage, drawn across all tasks.
        rules: tasks, by position, above which a thin line separates groups.
    """
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 0.8 / len(sides)
    figure, axes = plt.subplots(figsize=(9, 1.8 + len(tasks) * max(0.3, 0.16 * len(sides))), layout="constrained")
    for place, (name, values) in enumerate(sides.items()):
        where = np.arange(len(tasks)) + height * (place - (len(sides) - 1) / 2)
        bars = axes.barh(where, [value or 0.0 for value in values], height, label=_short(name))
        labels = ["-" if value is None else f"{value:.1f}" for value in values]
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # readable across a line
        axes.bar_label(bars, labels, padding=2, fontsize=7, bbox=on_white)
    for place, (name, value) in enumerate(lines.items()):
        label = f"{name}: {value:.1f}"
        axes.axvline(value, linestyle=("--", ":", "-.")[place % 3], color="black", linewidth=1, label=label)
    for place in rules:
        axes.axhline(place - 0.5, color="grey", linewidth=0.6)
    axes.set_yticks(np.arange(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 10))
    axes.grid(axis="x", color="lightgrey", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("%")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _short(name: str) -> str:
    return name if len(name) <= MAX_LABEL else "..." + name[-MAX_LABEL:]
