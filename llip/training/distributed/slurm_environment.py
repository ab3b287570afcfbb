"""The variables that torchrun would set for the tasks of a SLURM step, by which they find each other."""

import os
import subprocess
from collections.abc import Mapping

from llip.errors import UserError

FIRST_PORT, PORTS = 12_000, 20_000  # below Linux's ephemeral ports
_ATTEMPTS = 16  # ports per job
_STEP_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_PROCID")


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """Return the rendezvous port of this attempt of this job, in 12000 .. 31999.

    Attempts differ, so that a requeued job does not meet processes that the last one has left; so do jobs submitted
    shortly before or after, which may share the node.
    """
    job, attempt = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT") or 0)
    return FIRST_PORT + (job * _ATTEMPTS + attempt % _ATTEMPTS) % PORTS


def join_step(first_host: str) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this task of a SLURM step.

    Args:
        first_host: of task 0; unused where the job has one node, on which names need not resolve.
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


def joins_environment() -> bool:
    """Return whether torchrun, srun or our own launcher started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def adopt_slurm() -> None:
    """Under srun, set the variables that torchrun would set; elsewhere do nothing.

    Raises:
        UserError: SLURM's variables are incomplete, or scontrol does not answer.
    """
    if "SLURM_PROCID" not in os.environ or joins_environment() or os.environ.get("SLURM_NTASKS", "1") == "1":
        return
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return  # a batch script's own shell, not a task of a step
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        join_step(hosts[0])
    except (OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
        given = " ".join(f"{name}={os.environ[name]}" for name in _STEP_VARIABLES if name in os.environ)
        raise UserError(
            f"a SLURM step is in the environment ({given}), but its tasks cannot be found: "
            f"{type(error).__name__}: {error}; start them with srun, or unset SLURM_PROCID to train without SLURM"
        ) from error
