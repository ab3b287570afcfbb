"""The ladder on photographs: `python -m benchmarks.photos --train-data PATTERN --dev-data PATTERN [field=value ...]`.

Frozen EfficientNet-lite0 and MiniLM features are computed once; each run then trains a mixture head and a text
projection over them, minutes on one core. `--vary FIELD=VALUE,VALUE` trains every rung with each value, by default with
1 and 5 captions per image and step. Dev is scored with all captions of an image, in both directions. Finished runs are
not repeated and interrupted ones are resumed. Writes a table, a figure with error bars over seeds, and the results as
json.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.photos_model import write_model
from benchmarks.sweep import Result, Variant, draw_bars, draw_curves, parse_sweep, report, run_variants
from llip.config_search import search_config
from llip.configs import check_field_name
from llip.system.program import program

RUNGS = {
    "SigLIP": ["photos_siglip"],
    "+ registers": ["photos_llip", "pooling=first"],
    "average": ["photos_mean"],
    "learned weights": ["photos_llip", "pooling=learned"],
    "Llip": ["photos_llip"],
    "FLAIR": [
        "photos_llip", "pooling=flair", "mixture_tokens=1", "pair_tokens=patches", "global_loss_weight=0.5",
    ],
}  # fmt: skip
"""Label -> config and overrides, from the bottom to the top."""

COLUMNS = {
    f"{head} R@{k}": f"{key}_R@{k}"
    for head, key in (("image->text", "image_to_text"), ("text->image", "text_to_image"))
    for k in (1, 5, 10)
}
"""Heads of the table -> keys of the values."""


def wins(results: Sequence[Result]) -> dict[str, str]:
    """Return, by setting, in how many seeds Llip is above SigLIP in R@1 in both directions."""
    counted: dict[str, list[bool]] = {}
    values = {(result.variant, result.seed): result.values for result in results}
    for (label, seed), of_llip in values.items():
        rung, _, setting = label.partition(", ")
        of_siglip = values.get((label.replace("Llip", "SigLIP", 1), seed))
        if rung == "Llip" and of_siglip is not None:
            keys = (COLUMNS["image->text R@1"], COLUMNS["text->image R@1"])
            counted.setdefault(setting, []).append(all(of_llip[key] > of_siglip[key] for key in keys))
    return {setting: f"{sum(won)} of {len(won)}" for setting, won in counted.items()}


def photo_variants(
    rungs: Sequence[str], field: str, values: Sequence[str], overrides: Sequence[str], fixed: dict[str, object]
) -> list[Variant]:
    """Return rungs x values of a field.

    Args:
        rungs: labels of `RUNGS`.
        field: the name of a config field.
        values: of the field, as on the command line.
        overrides: field=value, for every run.
        fixed: fields that the benchmark sets.
    """
    variants = []
    for rung in rungs:
        name, *own = RUNGS[rung]
        for value in values:
            config = search_config(name, [*own, *overrides, f"{field}={value}"]).replace(**fixed)
            variants.append(Variant(f"{rung}, {field} = {value}", config))
    return variants


@program
def main(arguments: Sequence[str]) -> None:
    """Encode the photographs, run the variants, print the table and write table, figure and json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=__doc__.split("\n\n")[0])
    parser.add_argument("--train-data", required=True, metavar="PATTERN", help="webdataset shards to train on")
    parser.add_argument("--dev-data", required=True, metavar="PATTERN", help="shards to evaluate on: path/dev-*.tar")
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=["SigLIP", "average", "Llip"])
    parser.add_argument("--vary", default="captions_per_image=1,5", metavar="FIELD=VALUE,...", help="[%(default)s]")
    parser.add_argument("--features", type=Path, help="folder of the cached features [LOGS/features]")
    parser.add_argument("--model", type=Path, help="model json, instead of the one that is written for the two wheels")
    given = parse_sweep(parser, arguments, "logs/photos")
    field, _, values = given.vary.partition("=")
    values = values.split(",")
    check_field_name(field)
    model = given.model or write_model(given.logs / "model")
    base = search_config("photos_llip", given.overrides).replace(model=str(model), train_data=given.train_data)
    from benchmarks.photos_dev import DevSet  # imports torch
    from llip.tools.encode.encode import encode

    features = given.features or given.logs / "features"
    encoded = encode(base, features, "fp16")
    dev = DevSet(given.dev_data, base.caption_keys)
    fixed: dict[str, object] = {
        "model": str(model), "train_data": given.train_data, "feature_cache": str(features),
        "train_num_samples": encoded.usable,
    }  # fmt: skip
    variants = photo_variants(given.rungs, field, values, given.overrides, fixed)
    results = run_variants(variants, given.seeds, given.logs, "photos", dev.evaluate)
    stem = given.logs / f"photos_{field}"
    if len(values) > 1 and all(_is_number(value) for value in values):
        draw_curves(results, COLUMNS, field, stem.with_suffix(".png"))
    else:
        draw_bars(results, COLUMNS, f"Llip, {field} = {values[0]}", stem.with_suffix(".png"))
    more = {"llip_wins": wins(results), "dev": given.dev_data, "train": given.train_data, "images": encoded.usable}
    report(results, COLUMNS, stem, given.json, **more)
    if not given.json:
        print(f"Llip above SigLIP in R@1 both ways, in seeds: {wins(results)}")


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
