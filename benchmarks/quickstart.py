"""The ladder of poolings on the embedded scenes, over seeds: `python -m benchmarks.quickstart [--seeds 0 1] [--json]`.

Each rung trains the same encoder on the same data with the same steps and loss; only the way from mixture tokens to
the feature differs. Finished runs are not repeated and interrupted ones are resumed.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.sweep import Result, Variant, draw_bars, parse_sweep, report, run_variants
from llip.config_search import search_config
from llip.system.program import program

RUNGS = {
    "SigLIP": "quickstart_siglip",
    "+ registers": "quickstart_registers",
    "average": "quickstart_mean",
    "learned weights": "quickstart_learned",
    "Llip": "llip_quickstart",
    "FLAIR": "quickstart_flair",
}
"""The paper's ladder (its figure 3), from the bottom to the top, and FLAIR."""

COLUMNS = {
    "retrieval text->image R@1": "scenes_retrieval text_to_image_R@1",
    "retrieval text->image R@5": "scenes_retrieval text_to_image_R@5",
    "retrieval image->text R@5": "scenes_retrieval image_to_text_R@5",
    "top-left object top-1": "scenes_top_left top1",
    "red shape top-1": "scenes_red_shape top1",
    "background top-1": "scenes_background top1",
}
"""Heads of the table -> `task metric`."""


def wins(results: list[Result]) -> dict[str, int]:
    """Return, by column, in how many seeds Llip is above every other rung."""
    counted = dict.fromkeys(COLUMNS, 0)
    for seed in {result.seed for result in results}:
        by_rung = {result.variant: result.values for result in results if result.seed == seed}
        if set(by_rung) == set(RUNGS):
            for head, key in COLUMNS.items():
                others = [values[key] for rung, values in by_rung.items() if rung != "Llip"]
                counted[head] += by_rung["Llip"][key] > max(others)
    return counted


@program
def main(arguments: Sequence[str]) -> None:
    """Run the ladder, print the table and write table, figure and json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    given = parse_sweep(parser, arguments, "logs/ladder")
    variants = [Variant(rung, search_config(RUNGS[rung], given.overrides)) for rung in given.rungs]
    results = run_variants(variants, given.seeds, given.logs, "ladder")
    draw_bars(results, COLUMNS, "Llip", given.logs / "ladder.png")
    report(results, COLUMNS, given.logs / "ladder", given.json, llip_wins=wins(results))
    if not given.json:
        print(f"Llip above every other rung, of {len(given.seeds)} seeds: {wins(results)}")


if __name__ == "__main__":
    sys.exit(main())
