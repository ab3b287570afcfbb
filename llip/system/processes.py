"""This process's place among those of a run or an evaluation, and small collectives over them.

Works inside an initialised `torch.distributed` group (gloo or NCCL) and for a single process.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
GROUP_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait of a process of an evaluation for the others, whose share of the images may be slower to read."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """One process's rank, world size, device, and the store shared by all processes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    store: dist.Store | None = None  # key-value store of the rendezvous

    @classmethod
    def of_group(cls, device: torch.device = CPU) -> "Processes":
        """Return the place in the initialised process group; a single process without one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that writes files and logs."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return this process's indices of 0 .. total-1; every index belongs to exactly one process."""
        return range(self.rank, total, self.world_size)

    def gather_object(self, value: Any) -> list[Any] | None:
        """Return every process's `value` by rank on the main process, None elsewhere. For small plain values."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every process's `value` by rank, on every process. Tensors must be on the CPU: they travel pickled."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Return the main process's `value` on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce_max(self, values: list[float] | Tensor) -> list[float]:
        """Return the elementwise maximum of `values` [N] over the processes, on every process.

        A tensor must be on the processes' device, and is overwritten; the host waits for it once.
        """
        if not isinstance(values, Tensor):
            if self.world_size == 1:
                return values
            values = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce_max([0.0])

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.world_size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size


@contextmanager
def raise_on_all_ranks(
    processes: Processes, error_type: type[Exception], describe: Callable[[Exception], str | None]
) -> Iterator[None]:
    """Raise an error of the block on one process on all of them, so that none waits for another. Collective.

    The block must not call a collective itself.

    Args:
        processes: that run the block.
        error_type: raised on all of them, with the message of the first process that failed.
        describe: returns the message of an exception, or None for a bug, which propagates as it is.
    """
    message: str | None = None
    cause: Exception | None = None
    try:
        yield
    except Exception as error:
        message, cause = describe(error), error
        if message is None:
            raise
    for failed in processes.all_gather_object(message):
        if failed is not None:
            raise error_type(failed) from cause
