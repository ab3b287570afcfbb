"""How the tasks of a SLURM step find each other: the variables that torchrun would set, for each attempt."""

import os
from collections.abc import Mapping

STEP_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_PROCID")
"""Variables of a task from which its place in the step is read."""
FIRST_PORT, PORTS = 12_000, 20_000  # below Linux's ephemeral ports
_ATTEMPTS = 16  # ports per job


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """Return the rendezvous port of this attempt of this job, in 12000 .. 31999.

    Each attempt has another one, so that a requeued job does not meet leftovers of the last attempt; jobs submitted
    just before or after, which may share the node, have others too.
    """
    job, attempt = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT") or 0)
    return FIRST_PORT + (job * _ATTEMPTS + attempt % _ATTEMPTS) % PORTS


def join_step(first_host: str) -> None:
    """Set, for this task of a SLURM step, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Args:
        first_host: host of task 0; unused where the job has one node, since names need not resolve there.
    """
    one_node = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) == 1
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        MASTER_ADDR="127.0.0.1" if one_node else first_host,
        MASTER_PORT=str(rendezvous_port(os.environ)),
    )
    if one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
