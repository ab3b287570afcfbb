"""Train a config on a SLURM cluster: `python submitit_openclip.py <config> [field=value ...] --partition gpu`.

Asks for the config's nodes, one task per GPU, and runs `llip.main` in each task, with the code as it is now; the run's
folder holds SLURM's logs under `slurm/`. The same command continues a run that was stopped.
"""

import sys
from collections.abc import Sequence

from llip.cluster.training import parse_training, submit_training
from llip.system.program import program


@program
def main(arguments: Sequence[str]) -> int:
    """Submit the job and print where to look. Returns the exit code."""
    submit_training(parse_training(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
