"""`llip plan <config> [field=value ...]`: what a run will take.

Exit code: 0 when it fits into the GPU, 1 when it does not, 2 for a mistake in the request.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError
from llip.system.program import program


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from llip.system.gpus import GPUS

    parser = argparse.ArgumentParser(
        prog="llip plan",
        description="Parameters, FLOPs, memory, traffic and hours of a run, worked out without a GPU.",
        epilog="Exit code: 0 it fits into the GPU, 1 it does not, 2 a mistake in the request.",
    )
    parser.add_argument("config", help="as for llip.main; python -m llip.main --list shows all")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument("--gpu", default="h100-80g", metavar="NAME", help=f"{', '.join(GPUS)} [%(default)s]")
    parser.add_argument("--nodes", type=int, metavar="N", help="as many machines, at the config's global batch")
    parser.add_argument(
        "--mfu", type=mfu, metavar="X[-Y]", help="share of the GPU's peak [as published for models of this size]"
    )
    parser.add_argument("--network", type=float, default=50.0, metavar="GB/S", help="from GPU to GPU [%(default)s]")
    parser.add_argument("--sample-kb", type=float, default=50.0, metavar="KB", help="of a sample [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one json document instead of tables")
    return parser.parse_intermixed_args(argv)


def mfu(text: str) -> tuple[float, float]:
    """Return (high, low) of `LOW-HIGH`, or of a single number."""
    low, _, high = text.partition("-")
    return float(high or low), float(low)


def on_nodes(config: Config, nodes: int) -> Config:
    """Return the config on other machines, its global batch kept by `accum_freq`, or by `batch_size` where that must.

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: expected 1 or more")
    each, rest = divmod(config.global_batch, nodes * config.ngpus)
    if rest:
        raise UserError(
            f"--nodes {nodes}: the global batch of {config.global_batch:,} cannot be shared out evenly over "
            f"{nodes * config.ngpus} GPUs; to change it, write nodes={nodes} without the dashes"
        )
    steps = next(steps for steps in range(1, each + 1) if each % steps == 0 and each // steps <= config.batch_size)
    return config.replace(nodes=nodes, batch_size=each // steps, accum_freq=steps)


@program
def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    given = parse_arguments(argv)
    from llip.system.gpus import find_gpu
    from llip.tools.plan.estimate import Assumptions, make_plan
    from llip.tools.plan.table import as_table

    config = search_config(given.config, given.overrides)
    if given.nodes is not None:
        config = on_nodes(config, given.nodes)
    assumptions = Assumptions(given.mfu, given.network * 1e9, given.sample_kb * 1e3)
    plan = make_plan(config, find_gpu(given.gpu), assumptions)
    print(json.dumps(plan.to_dict()) if given.json else as_table(plan))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
