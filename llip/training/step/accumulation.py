"""Exact gradients of a contrastive batch that is larger than the memory: features first, towers slice by slice.

The loss couples all pairs, so slices cannot simply be summed. Features of every slice are computed without a graph and
cached (mixture tokens are small), the loss of the joined batch gives their gradients, and each slice is run again, with
the random state it had, to carry its part of them into the towers (the idea of GradCache, Gao et al. 2021).
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
    """Return what `set_random_state` goes back to."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Go back to `state`; what it knows of another kind of device is left out."""
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def backward_step(
    wrapped: DistributedDataParallel | ContrastiveTask,
    slices: Sequence[MicroBatch],
    autocast: Callable[[], AbstractContextManager],
    scale_loss: Callable[[Tensor], Tensor],
    given: Sequence[RandomState | None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave in `.grad` the gradient of the loss over all slices of all processes.

    Args:
        wrapped: the task, wrapped by DDP where there are several processes.
        slices: this process's part of the global batch, by micro-batch, on the device.
        autocast: gives the context that forward passes run in.
        scale_loss: applied to what is back-propagated (loss scaling for float16).
        given: the random state to go to before each slice, None to go on from the slice before; for a step that is
            computed again.

    Returns:
        (this process's loss value, detached; the task's report)
    """
    task = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    device = slices[0].images.device
    given = [None] * len(slices) if given is None else given
    if len(slices) == 1:
        if given[0] is not None:
            set_random_state(given[0], device)
        with autocast():
            loss, report = wrapped(*slices[0])
        scale_loss(loss).backward()
        return loss.detach(), report

    no_sync = wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext
    states, cached = [], []
    with torch.no_grad(), autocast():
        for batch, start in zip(slices, given, strict=True):
            if start is not None:
                set_random_state(start, device)
            states.append(random_state(device))
            cached.append(task.encode(batch.images, batch.tokens))
    after = random_state(device)
    features = Features(*(torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True)))
    with no_sync():  # head, scale and bias: their gradients wait in .grad for the last slice's synchronisation
        with autocast():
            loss, report = wrapped(mask=torch.cat([batch.mask for batch in slices]), features=features)
        scale_loss(loss).backward()

    assert features.h.grad is not None
    assert features.t.grad is not None
    h_grads = features.h.grad.split([len(batch.images) for batch in slices])
    t_grads = features.t.grad.split([batch.mask.numel() for batch in slices])
    for index, (batch, state, h_grad, t_grad) in enumerate(zip(slices, states, h_grads, t_grads, strict=True)):
        set_random_state(state, device)
        last = index == len(slices) - 1
        with nullcontext() if last else no_sync():
            with autocast():
                surrogate, _ = wrapped(*batch, feature_gradients=Features(h_grad, t_grad))
            surrogate.backward()  # the gradients carry the loss scale already
    set_random_state(after, device)
    return loss.detach(), report
