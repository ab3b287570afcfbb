"""The ladder of poolings on the embedded scenes, over seeds: `python -m benchmarks.quickstart [--seeds 0 1] [--json]`.

Each rung trains the same encoder on the same data with the same steps and loss; only the way from mixture tokens to
the feature differs. Runs that are finished are not repeated; what is half done goes on.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

from llip.configs import Config, search_config

RUNGS = {
    "SigLIP": "quickstart_siglip",
    "+ registers": "quickstart_registers",
    "average": "quickstart_mean",
    "learned weights": "quickstart_learned",
    "Llip": "llip_quickstart",
}
"""The paper's ladder (its figure 3), from the bottom to the top."""

METRICS = {
    "retrieval text->image R@1": ("scenes_retrieval", "text_to_image_R@1"),
    "retrieval text->image R@5": ("scenes_retrieval", "text_to_image_R@5"),
    "retrieval image->text R@5": ("scenes_retrieval", "image_to_text_R@5"),
    "top-left object top-1": ("scenes_top_left", "top1"),
    "red shape top-1": ("scenes_red_shape", "top1"),
    "background top-1": ("scenes_background", "top1"),
}
"""Columns of the table: (task, metric)."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained rung: its values by column, and the seconds its training took."""

    rung: str
    seed: int
    values: dict[str, float]
    train_seconds: float


def run_rung(rung: str, seed: int, logs: Path, overrides: list[str]) -> Result:
    """Train one rung with one seed, unless it is trained already, and evaluate it on the scenes."""
    config = search_config(RUNGS[rung], overrides)
    config = config.replace(name=f"{config.name}_seed{seed}", logs=str(logs), seed=seed, eval_steps=0, save_frequency=0)
    path = config.folder / "benchmark.json"
    if path.is_file():
        return Result(**json.loads(path.read_text()))
    from llip.main import train

    started = time.monotonic()
    train(config, "cpu" if config.device == "auto" else config.device)
    result = Result(rung, seed, evaluate(config), time.monotonic() - started)
    path.write_text(json.dumps(dataclasses.asdict(result)))
    return result


def evaluate(config: Config) -> dict[str, float]:
    """Return the values of `METRICS` for a finished run."""
    import torch

    import llip
    from llip.clipeval.catalog import load_catalog
    from llip.clipeval.evaluate import evaluate_tasks

    model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt")
    results = evaluate_tasks(
        model,
        model.preprocess_val,
        model.tokenizer,
        sorted({task for task, _ in METRICS.values()}),
        load_catalog("dataset_catalog.json"),
        device=torch.device("cpu"),
        batch_size=100,
        workers=1,
        progress=False,
    )
    values = {result.task: result.values for result in results}
    return {column: values[task][metric] for column, (task, metric) in METRICS.items()}


def table(results: list[Result]) -> str:
    """Return a Markdown table: mean and range over seeds, in percent."""
    lines = ["| | " + " | ".join(METRICS) + " | training s |", "|---" * (len(METRICS) + 2) + "|"]
    for rung in RUNGS:
        own = [result for result in results if result.rung == rung]
        if not own:
            continue
        cells = []
        for column in METRICS:
            values = [100 * result.values[column] for result in own]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        seconds = statistics.mean(result.train_seconds for result in own)
        lines.append(f"| {rung} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def wins(results: list[Result]) -> dict[str, int]:
    """Return, by column, in how many seeds Llip is above every other rung."""
    counted = dict.fromkeys(METRICS, 0)
    for seed in {result.seed for result in results}:
        by_rung = {result.rung: result.values for result in results if result.seed == seed}
        if set(by_rung) == set(RUNGS):
            for column in METRICS:
                others = [values[column] for rung, values in by_rung.items() if rung != "Llip"]
                counted[column] += by_rung["Llip"][column] > max(others)
    return counted


def draw(results: list[Result], path: Path) -> None:
    """Draw the ladder: a panel per metric, a bar per rung, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, column in zip(axes.flat, METRICS, strict=True):
        for position, rung in enumerate(RUNGS):
            values = [100 * result.values[column] for result in results if result.rung == rung]
            if values:
                color = "#c2410c" if rung == "Llip" else "#94a3b8"
                axis.bar(position, statistics.mean(values), color=color, zorder=2)
                axis.scatter([position] * len(values), values, color="black", s=12, zorder=3)
        axis.set_title(column + ", %", fontsize=10)
        axis.set_xticks(range(len(RUNGS)), RUNGS, rotation=20, fontsize=8)
        axis.grid(axis="y", alpha=0.3, zorder=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the ladder, print the table and write figure and json. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of every rung's config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--logs", type=Path, default=Path("logs/ladder"), help="folder of the runs [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    given = parser.parse_intermixed_args(arguments)
    results = [run_rung(rung, seed, given.logs, given.overrides) for seed in given.seeds for rung in given.rungs]
    draw(results, given.logs / "ladder.png")
    if given.json:
        print(json.dumps({"results": [dataclasses.asdict(result) for result in results], "llip_wins": wins(results)}))
    else:
        print(table(results))
        print(f"\nLlip above every other rung, of {len(given.seeds)} seeds: {wins(results)}")
        print(f"figure: {given.logs / 'ladder.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
