"""Which processes a run has, and how they start: the same command on a laptop, a GPU box, torchrun and srun."""

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from llip.configs import Config
from llip.errors import EXIT_USER, UserError

ERROR_FOLDER = "LLIP_ERROR_FOLDER"
"""Where the processes that this module starts leave a user's mistake, so that it is told once."""


def joins_environment() -> bool:
    """Tell whether torchrun, srun or our own launcher started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def adopt_slurm() -> None:
    """Under srun, describe this task's place in the variables that torchrun sets; elsewhere do nothing."""
    if "SLURM_PROCID" not in os.environ or joins_environment() or int(os.environ.get("SLURM_NTASKS", 1)) < 2:
        return
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return  # a batch script's own shell, not a task of a step
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        MASTER_ADDR=hosts.stdout.split()[0],
        MASTER_PORT=str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000),
    )


def resolve_device(config: Config) -> str:
    """Return cuda or cpu, having compared what the config asks for with what is here.

    Raises:
        UserError: more is asked for than there is, with the overrides to type and what they give.
    """
    import torch

    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    joined = int(os.environ["WORLD_SIZE"]) if joins_environment() else None
    if joined is not None and joined != config.processes:
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} = {config.processes} processes, and "
            f"the launcher started {joined}. {_restored(config, 1, joined)} (nodes x ngpus must be {joined})"
        )
    if joined is None and config.nodes > 1:
        found = f"{gpus} GPUs" if config.device != "cpu" else "CPUs"
        ngpus = max(1, gpus) if config.device != "cpu" else config.ngpus
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} GPUs, found one machine with {found} "
            "and no multi-node launch (submitit_openclip.py, srun or torchrun start one). "
            + _restored(config, 1, ngpus, on_cpu=config.device != "cpu" and gpus == 0)
        )
    if config.device == "cpu" or (config.device == "auto" and gpus == 0 and config.ngpus == 1):
        return "cpu"
    if gpus < config.ngpus:
        raise UserError(
            f"config {config.name} asks for {config.ngpus} GPUs on this machine, found {gpus}. "
            + _restored(config, config.nodes, max(1, gpus), on_cpu=gpus == 0)
        )
    return "cuda"


def _restored(config: Config, nodes: int, ngpus: int, on_cpu: bool = False) -> str:
    """Say what to type instead, the global batch that gives, and what restores the config's own."""
    overrides = f"nodes={nodes} ngpus={ngpus}" + (" device=cpu" if on_cpu else "")
    batch = config.batch_size * nodes * ngpus * config.accum_freq
    text = f"Type {overrides}: global batch {batch:,} in the place of {config.global_batch:,}"
    if batch != config.global_batch:
        accum = config.global_batch / (config.batch_size * nodes * ngpus)
        if accum == int(accum):
            text += f"; accum_freq={int(accum)} restores it"
        else:
            text += f"; accum_freq={round(accum)} gives {config.batch_size * nodes * ngpus * round(accum):,}"
    return text


def start_processes(arguments: list[str], count: int) -> int:
    """Start `count` processes of `python -m llip.main` on this machine with PyTorch's elastic launcher and wait.

    No process is restarted: the first failure ends all. A user's mistake is printed once.

    Returns:
        The exit code.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
    )
    with tempfile.TemporaryDirectory(prefix="llip-") as errors:
        os.environ[ERROR_FOLDER] = errors
        try:
            elastic_launch(launch, sys.executable)("-m", "llip.main", *arguments)
        except ChildFailedError as failure:
            told = [json.loads(path.read_text()) for path in sorted(Path(errors).glob("*.json"))]
            if told:
                print(f"error: {told[0]}", file=sys.stderr)
                return EXIT_USER
            rank, first = failure.get_first_failure()
            print(f"error: process {rank} failed with exit code {first.exitcode}; see above", file=sys.stderr)
            return 1
        finally:
            del os.environ[ERROR_FOLDER]
    return 0


def tell_user(error: UserError) -> int:
    """Tell a user's mistake once, however many processes make it, and return the exit code."""
    folder = os.environ.get(ERROR_FOLDER)
    if folder:  # the launcher tells
        (Path(folder) / f"{os.environ.get('RANK', 0):0>6}.json").write_text(json.dumps(str(error)))
    else:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USER
