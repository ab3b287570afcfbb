"""Evaluate a model zero-shot: `llip eval --fname config_evals/X.yaml [--devices cuda:0 cuda:1 | cpu]`.

`python -m evals.main_mc` is the same program. Exit code: 0 if every task was evaluated, 1 if some could not be, 2 for a
user's mistake, 3 if a process was killed before the first task.
"""

import argparse
import sys
from collections.abc import Sequence

from evals import scaffold
from llip.system.program import program


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip eval",
        description="Evaluate a model zero-shot on the tasks of a catalog.",
        epilog="Results are in <output_dir>/results.json and results.md; the same command resumes an evaluation.",
    )
    parser.add_argument("--fname", required=True, metavar="YAML", help="the evaluation, e.g. config_evals/X.yaml")
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="one process per device: cuda:0 cuda:1, or cpu (cpu cpu: two processes) [all CUDA devices, else cpu]",
    )
    return parser.parse_args(argv)


@program
def main(arguments: Sequence[str]) -> int:
    """Evaluate and return the exit code."""
    given = parse_arguments(arguments)
    config = scaffold.load(given.fname)
    from evals import mc  # imports torch: not for --help or a mistyped file
    from evals.devices import choose_devices

    return mc.run(config, choose_devices(given.devices))


if __name__ == "__main__":
    sys.exit(main())
