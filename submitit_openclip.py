"""Train a config on a SLURM cluster: `python submitit_openclip.py <config> [field=value ...] --partition gpu`.

The job has the config's nodes and one task per GPU, each of which runs `llip.main` with a copy of the present code. The
run's folder holds SLURM's logs under `slurm/`. The same command continues a stopped run.
"""

import sys
from collections.abc import Sequence

from llip.cluster.training import parse_training, submit_training
from llip.system.program import program


@program
def main(arguments: Sequence[str]) -> None:
    """Submit the job and print how to follow it."""
    submit_training(parse_training(arguments))


if __name__ == "__main__":
    sys.exit(main())
