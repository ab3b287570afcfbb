"""A task that cannot be evaluated ends alike on every process; the other tasks still run."""

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

from llip.errors import UserError
from llip.system.processes import Processes, raise_on_all_ranks

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class TaskError(Exception):
    """One task cannot be evaluated. Raised on every process alike; the message is for the user."""


def run_on_all(processes: Processes, work: Callable[[], Result]) -> Result:
    """Run `work` on every process and return this process's own result. `work` must not call a collective.

    Raises:
        TaskError: `work` failed somewhere; the message is that of the first process that failed.
    """

    def describe(error: Exception) -> str:
        if not isinstance(error, UserError | TaskError):
            logger.debug("evaluation failed on process %d\n%s", processes.rank, traceback.format_exc())
        place = f" (process {processes.rank} of {processes.world_size})" if processes.world_size > 1 else ""
        return (str(error) if isinstance(error, UserError | TaskError) else f"{type(error).__name__}: {error}") + place

    with raise_on_all_ranks(processes, TaskError, describe):
        return work()
    raise AssertionError("raise_on_all_ranks suppresses nothing")


def gather_from_all(processes: Processes, work: Callable[[], Result]) -> list[Result]:
    """Like `run_on_all`, but return the results of all processes by rank, on every process."""
    return processes.all_gather_object(run_on_all(processes, work))
