"""Differentiable collectives of the objectives: gathered texts, combined column normalisers.

Shapes: T texts of one process, W processes. Mixture tokens never travel between processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llip.system.processes import Processes

# torch 2.14 deprecates the names on the right, which are all that older versions have
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _GatherTexts(torch.autograd.Function):
    """All-gather forward; backward the *sum* over processes of the gradient of this process's texts."""

    @staticmethod
    def forward(ctx: Any, texts: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.world_size = rank, world_size
        gathered = texts.new_empty((world_size * len(texts), *texts.shape[1:]))
        _all_gather(gathered, texts.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # torch's stub: *args
        grad = grad.contiguous()
        if dist.get_backend() != "nccl":  # gloo's reduce-scatter is young; an all-reduce is the same sum
            dist.all_reduce(grad)
            return grad.chunk(ctx.world_size)[ctx.rank].clone(), None, None
        share = grad.new_empty((len(grad) // ctx.world_size, *grad.shape[1:]))
        _reduce_scatter(share, grad)
        return share, None, None


def gather_texts(texts: Tensor, processes: Processes) -> Tensor:
    """Return the texts of all processes [W T, D], by rank; gradients flow back to the process of each text."""
    if processes.world_size == 1:
        return texts
    return _GatherTexts.apply(texts, processes.rank, processes.world_size)


def combine_logsumexp(columns: Tensor) -> Tensor:
    """Return the log-sum-exp over the images of all processes [T], from those over each process's images [T]."""
    maximum = columns.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    total = (columns - maximum).exp()
    dist.all_reduce(total)
    return maximum + total.log()
