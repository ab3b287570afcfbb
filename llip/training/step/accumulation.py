"""Exact gradients of a contrastive batch that does not fit into memory: features first, towers by micro-batch.

The loss couples all pairs, so losses of micro-batches cannot simply be summed. The features of all micro-batches are
computed without a graph and cached (mixture tokens are small), the loss of the joined batch gives their gradients, and
each micro-batch is run again, from the same random state, to propagate its gradients into the towers (GradCache, Gao et
al. 2021).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llip.data.loader import MicroBatch
from llip.training.step.task import ContrastiveTask, Features

RandomState = tuple[Tensor, Tensor | None]
"""Of the CPU's generator, and of the device's where that is CUDA."""


def random_state(device: torch.device) -> RandomState:
    """Return the state of the generators, for `set_random_state`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore `state`; that of another kind of device is ignored."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def backward_step(
    wrapped: DistributedDataParallel | ContrastiveTask,
    micro_batches: Sequence[MicroBatch],
    autocast: Callable[[], AbstractContextManager],
    scale_loss: Callable[[Tensor], Tensor],
    given: Sequence[RandomState | None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradient of the loss over all micro-batches of all processes, into `.grad`.

    Args:
        wrapped: the task, wrapped by DDP where there are several processes.
        micro_batches: this process's part of the global batch, on the device.
        autocast: gives the context that forward passes run in.
        scale_loss: applied to what is back-propagated (loss scaling for float16).
        given: the random state to restore before each micro-batch, None to continue from the one before; for replays.

    Returns:
        (this process's loss value, detached; the task's report)
    """
    task = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    device = micro_batches[0].images.device
    given = [None] * len(micro_batches) if given is None else given
    if len(micro_batches) == 1:
        if given[0] is not None:
            set_random_state(given[0], device)
        with autocast():
            loss, report = wrapped(*micro_batches[0])
        scale_loss(loss).backward()
        return loss.detach(), report

    no_sync = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext
    states, cached = [], []
    with torch.no_grad(), autocast():
        for batch, start in zip(micro_batches, given, strict=True):
            if start is not None:
                set_random_state(start, device)
            states.append(random_state(device))
            cached.append(task.encode(batch.images, batch.tokens))
    features = Features(*(torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True)))
    with no_sync():  # head, scale and bias: their gradients stay local until the last micro-batch
        with autocast():
            loss, report = wrapped(mask=torch.cat([batch.mask for batch in micro_batches]), features=features)
        scale_loss(loss).backward()
    after = random_state(device)  # the loss may have drawn too

    assert features.h.grad is not None
    assert features.t.grad is not None
    h_grads = features.h.grad.split([len(batch.images) for batch in micro_batches])
    t_grads = features.t.grad.split([batch.mask.numel() for batch in micro_batches])
    for index, (batch, state, h_grad, t_grad) in enumerate(zip(micro_batches, states, h_grads, t_grads, strict=True)):
        set_random_state(state, device)
        last = index == len(micro_batches) - 1
        with nullcontext() if last else no_sync():
            with autocast():
                surrogate, _ = wrapped(*batch, feature_gradients=Features(h_grad, t_grad))
            surrogate.backward()  # the gradients carry the loss scale already
    set_random_state(after, device)
    return loss.detach(), report
