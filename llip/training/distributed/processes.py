"""Join the process group of a run."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from llip.configs import Config
from llip.errors import RunError
from llip.system.cores import usable_cores
from llip.system.processes import Processes

_LATER = 60.0  # seconds by which a collective times out after the watchdog, which names the missing process
PATIENCE = 6.0
"""Times `timeout_minutes`: how long the other processes wait for a checkpoint or an evaluation."""


@contextmanager
def join_processes(config: Config, device_type: str) -> Iterator[Processes]:
    """Join the run's process group, as the environment describes it (RANK, WORLD_SIZE, ...), and leave it at the end.

    Raises:
        RunError: not all processes joined within `timeout_minutes`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.precision != "fp32":  # float32 products outside autocast may use TF32
            torch.set_float32_matmul_precision("high")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    else:  # launchers set OMP_NUM_THREADS=1; share the cores instead, and leave one to each data worker
        torch.set_num_threads(max(1, usable_cores() // config.ngpus - config.workers))
    store = _join_group(rank, world_size, device, 60 * config.timeout_minutes) if world_size > 1 else None
    yield Processes(rank, world_size, device, store)
    if dist.is_initialized():  # not after an error: a dead process cannot take part, and this one exits anyway
        dist.destroy_process_group()


def _join_group(rank: int, world_size: int, device: torch.device, deadline: float) -> dist.Store:
    timeout = datetime.timedelta(seconds=PATIENCE * deadline + _LATER)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=datetime.timedelta(seconds=deadline)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first_line = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"process {rank} of {world_size} could not join the others at {address} within {deadline:.0f} s "
            f"(timeout_minutes): {first_line[:200]}"
        ) from error
    return dist.PrefixStore("llip", store.clone() if hasattr(store, "clone") else store)
