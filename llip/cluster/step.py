"""One task of a job leads, the others follow: a program written for one process runs its work in all tasks of a step.

The first task runs the program; where it calls `everywhere`, each task runs the same function with the same arguments.
"""

import datetime
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from llip.errors import UserError

_TOGETHER = "raised while all tasks worked"


def is_leading() -> bool:
    """Return whether this process leads the tasks of a job: it runs the program inside `lead_or_follow`."""
    return dist.is_initialized() and dist.get_rank() == 0


def lead_or_follow(program: Callable[[], int], device: str, patience: datetime.timedelta) -> int:
    """Run `program` in task 0, and in the others what it hands out with `everywhere`.

    A task that fails leaves at once; SLURM ends those that do not notice.

    Args:
        program: returns an exit code.
        device: cuda or cpu. patience: longest that a task waits for another.

    Returns:
        The program's exit code in task 0, else 0.
    """
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=patience)
    try:
        code = _lead(program) if dist.get_rank() == 0 else _follow()
    except UserError:
        if (
            device == "cpu"
        ):  # gloo's threads abort a process that exits with them; NCCL may wait for tasks that are gone
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    return code


def _lead(program: Callable[[], int]) -> int:
    try:
        code = program()
    except UserError as error:
        if _TOGETHER not in getattr(error, "__notes__", ()):
            _from_leader(None)  # the others still wait for work
        raise
    _from_leader(None)
    return code


def _follow() -> int:
    while (work := _from_leader(None)) is not None:
        function, args = work
        function(*args)
    return 0


def everywhere(function: Callable[..., None], *args: Any) -> None:
    """Run `function(*args)` in all tasks; importable, for it travels to them. For the leader alone."""
    assert is_leading(), "only the leading task hands out work"
    _from_leader((function, args))
    try:
        function(*args)
    except UserError as error:
        error.add_note(_TOGETHER)
        raise


def _from_leader(work: tuple[Callable[..., None], tuple] | None) -> tuple[Callable[..., None], tuple] | None:
    box = [work]
    dist.broadcast_object_list(box, src=0)
    return box[0]
