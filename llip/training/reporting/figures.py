"""The curves of a run as a figure."""

import logging
import math
from pathlib import Path
from typing import Any

from llip.training.checkpoints.records import EVALS, METRICS, read_records

_PANELS = (
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("logit_scale", "logit scale"),
    ("samples_per_second", "samples / s"),
    ("data_wait_fraction", "fraction of time waiting for data"),
)


def draw_curves(folder: Path) -> Path | None:
    """Draw `<folder>/figures/curves.png` from the run's metrics and online evaluations.

    Returns:
        The file; None where nothing is logged yet, or, with a warning, where the disk cannot take it.
    """
    try:
        evals = [record for record in read_records(folder / EVALS) if record.get("task") and record.get("values")]
        return _draw(folder, read_records(folder / METRICS), evals)
    except OSError as error:
        logging.getLogger("llip").warning("the curves of %s cannot be drawn: %s", folder, error)
        return None


def _draw(folder: Path, records: list[dict[str, Any]], evals: list[dict[str, Any]]) -> Path | None:
    if not records:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    panels = len(_PANELS) + bool(evals)
    columns = 3
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.7 * rows), squeeze=False)
    for axis, (key, title) in zip(axes.flat, _PANELS, strict=False):
        axis.plot(steps, [record.get(key) for record in records], linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    if evals:
        axis = axes.flat[len(_PANELS)]
        for task in dict.fromkeys(record["task"] for record in evals):
            results = [record for record in evals if record["task"] == task]
            metric = next(iter(results[0]["values"]))  # the task's first
            points = [(record["step"], record["values"].get(metric, math.nan)) for record in results]
            axis.plot([x for x, _ in points], [100 * y for _, y in points], marker="o", label=f"{task}, {metric}")
        axis.set_title("zero-shot, %", fontsize=10)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[panels:]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(folder.name)
    figure.tight_layout()
    (folder / "figures").mkdir(exist_ok=True)
    target = folder / "figures" / "curves.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
