"""The paper's ablations at any size: `python -m benchmarks.ablations ladder|tokens|temperature [field=value ...]`.

`ladder` varies the pooling, `tokens` the number of mixture tokens K, `temperature` that of the pooling's softmax; all
else stays. The base is `--config`, by default the quickstart; the tasks are those of its `evals`. Finished runs are not
repeated and interrupted ones are resumed. Writes a table, a figure with error bars over seeds, and the results as json.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.sweep import Variant, draw_bars, draw_curves, parse_sweep, report, run_variants
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


def make_variants(kind: str, base: Config, values: Sequence[float] | None) -> list[Variant]:
    """Return the variants of one ablation.

    Raises:
        UserError: a base that the ablation does not fit, or values that are out of range.
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
    if kind == "tokens":
        return [Variant(f"K = {int(k)}", base.replace(mixture_tokens=int(k))) for k in values or TOKENS]
    return [Variant(f"tau = {tau:g}", base.replace(softmax_temperature=float(tau))) for tau in values or TEMPERATURES]


@program
def main(arguments: Sequence[str]) -> None:
    """Run an ablation, print its table and write table, figure and json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=("ladder", "tokens", "temperature"), help="what is varied")
    parser.add_argument("--config", default="llip_quickstart", help="the base [%(default)s]")
    parser.add_argument("--values", type=float, nargs="+", help=f"[{TOKENS} tokens, temperatures {TEMPERATURES}]")
    given = parse_sweep(parser, arguments, "logs/ablations")
    base = search_config(given.config, given.overrides)
    name = f"{base.name}_{given.kind}"
    results = run_variants(make_variants(given.kind, base, given.values), given.seeds, given.logs, name)
    columns, stem = {key: key for key in results[0].values}, given.logs / name
    if given.kind == "ladder":
        draw_bars(results, columns, "Llip", stem.with_suffix(".png"))
    else:
        label = "mixture tokens K" if given.kind == "tokens" else "softmax temperature"
        draw_curves(results, columns, label, stem.with_suffix(".png"))
    report(results, columns, stem, given.json, kind=given.kind)


if __name__ == "__main__":
    sys.exit(main())
