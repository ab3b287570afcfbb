"""What each task of a training job runs, and how it ends: finished, failed, or stopped and queued again."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llip.errors import EXIT_STOPPED
from llip.training.distributed.slurm_environment import join_step

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from llip.training.evaluation import SubmitEvaluation

_WARNING = signal.SIGUSR2
_DEADLINE = 60


def join_job() -> None:
    """Set the variables from which PyTorch reads this task's place in the job."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    join_step(SlurmJobEnvironment().hostnames[0])


class JobTask:
    """One task of a job; submitit pickles it, and starts it from the beginning when the job is queued again."""

    def __call__(self) -> int:
        """Run the task, and exit with a code other than 0 where it failed."""
        raise NotImplementedError

    def checkpoint(self, *_: object) -> "DelayedSubmission":
        """Return what submitit runs after a requeue; without a method of this name it does not requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # the name under which submitit calls it


@dataclasses.dataclass(frozen=True)
class TrainTask(JobTask):
    """Trains a config.

    Attributes:
        arguments: of `llip.main`.
        folder: where the job was submitted, to which relative paths of the config belong.
        evaluation_jobs: submits the jobs of the online evaluation; None: evaluate in this job.
    """

    arguments: list[str]
    folder: str
    evaluation_jobs: "SubmitEvaluation | None" = None

    def __call__(self) -> int:
        """Join the other tasks and train.

        When SLURM announces the limit or a preemption, the run saves and the job is queued again. A failure exits with
        llip.main's code, so that the job counts as failed.
        """
        from llip.main import main

        os.chdir(self.folder)
        join_job()
        requeue = signal.getsignal(_WARNING)  # submitit's; it queues the job again
        with _noted_signals() as received:
            code = main(self.arguments, self.evaluation_jobs)
        if code == EXIT_STOPPED:
            if os.environ["SLURM_PROCID"] != "0":
                raise SystemExit(0)  # task 0 decides for the job, and may be about to queue it
            if _WARNING in received or _is_preempted():
                assert callable(requeue), "submitit handles the signal"
                requeue(_WARNING, None)  # does not return
        if code:
            raise SystemExit(code)
        return code


@contextlib.contextmanager
def _noted_signals() -> Iterator[set[int]]:
    """Yield a set that holds, after the block, the signals that reached this process, whoever handled them."""
    received: set[int] = set()
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield received
        finally:
            signal.set_wakeup_fd(before)
            with contextlib.suppress(BlockingIOError):
                received.update(reader.recv(4096))


def _is_preempted() -> bool:
    """Return whether SLURM is preempting this job; a job that exits by itself is not requeued."""
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]],
            capture_output=True,
            text=True,
            timeout=_DEADLINE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
