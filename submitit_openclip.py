"""Train a config on a SLURM cluster: `python submitit_openclip.py <config> [field=value ...] --partition gpu`.

Asks for the config's nodes, one task per GPU, and runs `llip.main` in each task, with the code as it is now; the run's
folder holds SLURM's logs under `slurm/`. The same command continues a run that was stopped.
"""

import sys

from llip.cluster.training import parse_training, submit_training
from llip.errors import EXIT_USER, UserError


def main(arguments: list[str] | None = None) -> int:
    """Submit the job and print where to look. Returns the exit code."""
    try:
        submit_training(parse_training(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    return 0


if __name__ == "__main__":
    sys.exit(main())
