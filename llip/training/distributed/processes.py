"""What crosses processes: joining the group, gathering texts, combining the softmax's column normalisers.

Shapes: T texts of one process, W processes, D embedding width. Mixture tokens never travel.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from llip.configs import Config
from llip.errors import RunError
from llip.system.cores import usable_cores
from llip.system.processes import Processes

_LATER = 60.0  # seconds by which a collective's own deadline comes after the watch's, which says more
PATIENCE = 6.0
"""Times `timeout_minutes`: what a checkpoint or an evaluation may take, for which the other processes wait."""


@contextmanager
def join_processes(config: Config, device_type: str) -> Iterator[Processes]:
    """Join the run's processes as the environment describes them (RANK, WORLD_SIZE, ...), and leave them at the end.

    Raises:
        RunError: not all of them came within `timeout_minutes`.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.precision != "fp32":  # what autocast leaves in float32 may use the tensor cores' 10-bit products
            torch.set_float32_matmul_precision("high")
    else:  # the launcher pins OMP to one thread; share the cores instead, and leave one to each data worker
        torch.set_num_threads(max(1, usable_cores() // config.ngpus - config.workers))
    store = _join_group(rank, count, device, 60 * config.timeout_minutes) if count > 1 else None
    yield Processes(rank, count, device, store)
    if dist.is_initialized():  # not after an error, with which the process ends: what died cannot take part
        dist.destroy_process_group()


def _join_group(rank: int, count: int, device: torch.device, deadline: float) -> dist.Store:
    options = {"device_id": device} if device.type == "cuda" else {}
    wait = datetime.timedelta(seconds=PATIENCE * deadline + _LATER)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=datetime.timedelta(seconds=deadline)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store), rank=rank, world_size=count, timeout=wait, **options,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first_line = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"process {rank} of {count} could not join the others at {place} within {deadline:.0f} s "
            f"(timeout_minutes): {first_line[:200]}"
        ) from error
    return dist.PrefixStore("llip", store.clone() if hasattr(store, "clone") else store)


class _GatherTexts(torch.autograd.Function):
    """All-gather forward; backward the *sum* over processes of the gradient of this process's texts."""

    @staticmethod
    def forward(ctx, texts: Tensor, rank: int, count: int) -> Tensor:
        ctx.rank, ctx.count = rank, count
        gathered = texts.new_empty((count * len(texts), *texts.shape[1:]))
        dist.all_gather_into_tensor(gathered, texts.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        own = grad.new_empty((len(grad) // ctx.count, *grad.shape[1:]))
        if dist.get_backend() == "nccl":
            dist.reduce_scatter_tensor(own, grad)
        else:  # gloo's reduce-scatter is young; an all-reduce is the same sum
            dist.all_reduce(grad)
            own.copy_(grad.chunk(ctx.count)[ctx.rank])
        return own, None, None


def gather_texts(texts: Tensor, processes: Processes) -> Tensor:
    """Return the texts of all processes [W T, D], by rank; gradients flow back to the process of each text."""
    if processes.world_size == 1:
        return texts
    return _GatherTexts.apply(texts, processes.rank, processes.world_size)


def combine_logsumexp(columns: Tensor) -> Tensor:
    """Return the log-sum-exp over the images of all processes, from those over each process's own [T]."""
    largest = columns.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (columns - largest).exp()
    dist.all_reduce(total)
    return largest + total.log()
