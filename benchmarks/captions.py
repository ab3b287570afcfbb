"""Captions per image: `python -m benchmarks.captions step|data [field=value ...]`.

`step` varies how many captions of an image a step compares (`captions_per_image`), at equal images seen or, with
`--equal time`, at equal training time. `data` varies how many true captions the training scenes have, of the same
pictures; the evaluation sets stay. Each for rungs of the ladder, over seeds. Finished runs are not repeated and
interrupted ones are resumed. Writes a table, a figure with error bars over seeds, and the results as json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quickstart import COLUMNS, RUNGS
from benchmarks.sweep import Variant, draw_curves, parse_sweep, report, run_variants, train
from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError
from llip.scenes import ensure_scenes
from llip.system.files import write_json
from llip.system.program import program
from llip.training.checkpoints.records import read_records

CAPTIONS = {"step": (1, 2, 4, 8), "data": (1, 2, 3, 4, 6)}
_STEPS, _WARM_UP = 60, 20  # of a run that is timed, and those before its time counts


def images_per_second(config: Config, logs: Path) -> float:
    """Return the training speed of a config, from a short run; a speed that is on record is not measured again."""
    name = f"speed_{config.name}_N{config.captions_per_image}"
    record = logs / f"{name}.json"
    if not record.is_file():
        samples = config.global_batch * _STEPS
        train(config.replace(
            name=name, logs=str(logs), train_num_samples=samples, epochs=1, warmup=1, eval_steps=0, save_frequency=0,
            log_steps=_WARM_UP, resume=None,
        ))  # fmt: skip
        rates = [line["samples_per_second"] for line in read_records(logs / name / "metrics.jsonl")][1:]
        write_json(record, {"images_per_second": len(rates) / sum(1 / rate for rate in rates)})
    return json.loads(record.read_text())["images_per_second"]


def step_variants(rungs: dict[str, Config], counts: Sequence[int], equal: str, logs: Path) -> list[Variant]:
    """Return rungs x captions per image of a step.

    Args:
        rungs: configs by label.
        counts: values of captions_per_image.
        equal: images or time, of the run with one caption per image.
        logs: folder of the runs.
    """
    variants = []
    for label, base in rungs.items():
        for count in counts:
            config = base.replace(captions_per_image=count)
            if equal == "time" and count > 1:
                share = images_per_second(config, logs) / images_per_second(base.replace(captions_per_image=1), logs)
                steps = max(1, round(config.steps_per_epoch * share))
                config = config.replace(train_num_samples=steps * config.global_batch)
            variants.append(Variant(f"{label}, N = {count}", config))
    return variants


def data_variants(rungs: dict[str, Config], counts: Sequence[int], logs: Path) -> list[Variant]:
    """Return rungs x true captions of a training scene; renders the scenes where they are not there."""
    variants = []
    for label, base in rungs.items():
        for count in counts:
            scenes = ensure_scenes(logs / f"scenes_{count}_captions", captions=count)
            config = base.replace(train_data=str(scenes.resolve() / "train-*.tar"))
            variants.append(Variant(f"{label}, captions = {count}", config))
    return variants


@program
def main(arguments: Sequence[str]) -> None:
    """Run a study, print its table and write table, figure and json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captions", description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=tuple(CAPTIONS), help="captions in a step, or of the training data")
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=["SigLIP", "Llip"])
    parser.add_argument("--counts", type=int, nargs="+", help=f"numbers of captions [{CAPTIONS}]")
    parser.add_argument("--equal", choices=("images", "time"), default="images", help="what runs share [%(default)s]")
    given = parse_sweep(parser, arguments, "logs/captions")
    counts = given.counts or CAPTIONS[given.kind]
    if min(counts) < 1:
        raise UserError(f"--counts {' '.join(map(str, counts))}: expected numbers from 1 on")
    rungs = {label: search_config(RUNGS[label], given.overrides) for label in given.rungs}
    name = f"captions_{given.kind}"
    if given.kind == "step":
        name += f"_equal_{given.equal}"
        variants = step_variants(rungs, counts, given.equal, given.logs)
    else:
        variants = data_variants(rungs, counts, given.logs)
    results = run_variants(variants, given.seeds, given.logs, name)
    stem = given.logs / name
    axis = {"step": "captions per image in a step", "data": "true captions per training image"}[given.kind]
    draw_curves(results, COLUMNS, axis, stem.with_suffix(".png"))
    report(results, COLUMNS, stem, given.json, kind=given.kind, equal=given.equal)


if __name__ == "__main__":
    sys.exit(main())
