"""The paper's ablations at any size: `python -m benchmarks.ablations ladder|tokens|temperature [field=value ...]`.

`ladder` varies the pooling, `tokens` the number of mixture tokens K, `temperature` that of the pooling's softmax; all
else stays. The base is `--config`, by default the quickstart; the tasks are those of its `evals`. Finished runs are not
repeated; what is half done goes on. Writes a table, a picture with error bars over seeds, and the results as json.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sweep import Variant, draw_bars, draw_curves, run_variants, table
from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError
from llip.system.program import program

TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""Values of K, as in the paper."""
TEMPERATURES = (1, 2, 5, 10)


def ladder(base: Config) -> list[Variant]:
    """Return the rungs of the paper's figure 3 for `base`, whose pooling is the top one."""
    return [
        Variant("SigLIP" if base.loss == "sigmoid" else "CLIP", base.replace(pooling="first", mixture_tokens=1)),
        Variant("+ registers", base.replace(pooling="first")),
        Variant("average", base.replace(pooling="mean")),
        Variant("learned weights", base.replace(pooling="learned")),
        Variant("Llip", base),
    ]


def by_tokens(base: Config, values: Sequence[float]) -> list[Variant]:
    """Return `base` with each number of mixture tokens."""
    return [Variant(f"K = {int(value)}", base.replace(mixture_tokens=int(value))) for value in values]


def by_temperature(base: Config, values: Sequence[float]) -> list[Variant]:
    """Return `base` with each softmax temperature."""
    return [Variant(f"tau = {value:g}", base.replace(softmax_temperature=float(value))) for value in values]


def make_variants(kind: str, base: Config, values: Sequence[float] | None) -> list[Variant]:
    """Return the variants of one ablation.

    Raises:
        UserError: a base that the ablation does not fit, or values that are none.
    """
    if base.pooling != "text" or not base.evals:
        raise UserError(
            f"config {base.name}: an ablation needs pooling=text and evaluation tasks; found pooling={base.pooling}, "
            f"evals={','.join(base.evals) or 'none'}"
        )
    if kind == "ladder":
        if values:
            raise UserError("--values is for tokens and temperature; the ladder has its rungs")
        return ladder(base)
    if values and any(value <= 0 or (kind == "tokens" and value != int(value)) for value in values):
        raise UserError(f"--values {' '.join(f'{value:g}' for value in values)}: expected numbers above 0")
    return by_tokens(base, values or TOKENS) if kind == "tokens" else by_temperature(base, values or TEMPERATURES)


@program
def main(arguments: Sequence[str]) -> int:
    """Run an ablation, print its table and write figure and json. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=("ladder", "tokens", "temperature"), help="what is varied")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the base config")
    parser.add_argument("--config", default="llip_quickstart", help="the base [%(default)s]")
    parser.add_argument("--values", type=float, nargs="+", help=f"[{TOKENS} tokens, temperatures {TEMPERATURES}]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--logs", type=Path, default=Path("logs/ablations"), help="folder of the runs [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    given = parser.parse_intermixed_args(arguments)
    base = search_config(given.config, given.overrides)
    variants = make_variants(given.kind, base, given.values)
    results = run_variants(variants, given.seeds, given.logs, f"{base.name}_{given.kind}")
    columns = {key: key for key in results[0].values}
    stem = given.logs / f"{base.name}_{given.kind}"
    if given.kind == "ladder":
        draw_bars(results, columns, "Llip", stem.with_suffix(".png"))
    else:
        label = "mixture tokens K" if given.kind == "tokens" else "softmax temperature"
        draw_curves(results, columns, label, stem.with_suffix(".png"))
    text = table(results, columns)
    stem.with_suffix(".md").write_text(text + "\n")
    record = json.dumps({"kind": given.kind, "results": [dataclasses.asdict(result) for result in results]})
    stem.with_suffix(".json").write_text(record + "\n")
    print(record if given.json else f"{text}\n\nfigure: {stem.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
