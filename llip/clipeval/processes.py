"""What one process of an evaluation knows of the others: its share of the work, and how results and errors meet.

Works inside an initialised `torch.distributed` group (gloo or NCCL) and alone.
"""

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from llip.errors import UserError

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class TaskError(Exception):
    """One task cannot be evaluated. Raised on every process alike; the message is for the user."""


class Processes:
    """The processes that evaluate together; `rank` of `count`."""

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.count = dist.get_world_size() if grouped else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return the indices of 0 .. total-1 that are this process's: every one belongs to exactly one process."""
        return range(self.rank, total, self.count)

    def locally(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every process and return this process's own result.

        Whatever goes wrong on one process is raised on all of them, so that none is left waiting for another.
        `work` must not call a collective itself.

        Raises:
            TaskError: `work` failed somewhere; the message is the first failing process's.
        """
        result, error = _attempt(work, self.rank)
        self._gather(None, error)
        return result

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Like `locally`, but return the results of all processes, in the order of their ranks, on every process.

        Tensors in a result must be on the CPU: they travel pickled.
        """
        return self._gather(*_attempt(work, self.rank))

    def _gather(self, result: Result, error: str | None) -> list[Result]:
        outcomes: list = [(result, error)]
        if self.count > 1:
            outcomes = [None] * self.count
            dist.all_gather_object(outcomes, (result, error))
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise TaskError(problem + (f" (process {rank} of {self.count})" if self.count > 1 else ""))
        return [outcome for outcome, _ in outcomes]


def _attempt(work: Callable[[], Result], rank: int) -> tuple[Result | None, str | None]:
    try:
        return work(), None
    except (UserError, TaskError) as mistake:
        return None, str(mistake)
    except Exception as mistake:
        logger.debug("evaluation failed on process %d\n%s", rank, traceback.format_exc())
        return None, f"{type(mistake).__name__}: {mistake}"
