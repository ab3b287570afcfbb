"""Evaluate a checkpoint zero-shot.

    python -m evals.main_mc --fname config_evals/X.yaml [--devices cuda:0 cuda:1 | cpu]

Exit code: 0 when every task was evaluated, 1 when some could not be, 2 for a mistake in the request.
"""

import argparse
import sys
from collections.abc import Sequence

from evals import scaffold
from llip.system.program import program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.main_mc",
        description="Evaluate a checkpoint zero-shot on the tasks of a catalog.",
        epilog="Results go to <output_dir>/results.json and results.md; tasks done for the same checkpoint are kept.",
    )
    parser.add_argument("--fname", required=True, metavar="YAML", help="the evaluation, e.g. config_evals/X.yaml")
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="one process per device: cuda:0 cuda:1, or cpu (cpu cpu: two processes); all CUDA devices when left out",
    )
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> int:
    """Run the program that the YAML names; return its exit code. Finished tasks are kept, also after Ctrl-C."""
    arguments = parse_arguments(argv)
    config = scaffold.load(arguments.fname)
    from evals.main_distributed import choose_devices  # imports torch: not for --help or a mistyped file

    return scaffold.program(config)(config, choose_devices(arguments.devices))


if __name__ == "__main__":
    sys.exit(main())
