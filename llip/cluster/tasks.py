"""What each task of a training job runs, and how it ends: finished, failed, or stopped and queued again."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llip.errors import EXIT_STOPPED
from llip.training.distributed.slurm_environment import join_step

if TYPE_CHECKING:
    from llip.training.evaluation import SubmitEvaluation

_WARNING = signal.SIGUSR2
_DEADLINE = 60


def join_job() -> None:
    """Describe this task's place in the job for PyTorch; see `rendezvous`."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    join_step(SlurmJobEnvironment().hostnames[0])


class TrainTask:
    """Trains a config as one task of a job; picklable, so that SLURM can start it again as it was."""

    def __init__(self, arguments: list[str], folder: str, evaluation_jobs: "SubmitEvaluation | None" = None) -> None:
        """Describe the task.

        Args:
            arguments: what `llip.main` is called with.
            folder: where the job was submitted: relative paths of the config belong to it.
            evaluation_jobs: submits the jobs of the online evaluation; None: evaluate in this job.
        """
        self.arguments, self.folder, self.evaluation_jobs = arguments, folder, evaluation_jobs

    def __call__(self) -> int:
        """Join the other tasks and train.

        When SLURM announces the limit or a preemption, the run saves and the job is queued again. A failure leaves with
        llip.main's exit code, so that the job counts as failed.
        """
        from llip.main import main

        os.chdir(self.folder)
        join_job()
        requeue = signal.getsignal(_WARNING)  # submitit's; it queues the job again
        with _noted_signals() as heard:
            code = main(self.arguments, self.evaluation_jobs)
        if code == EXIT_STOPPED:
            if os.environ["SLURM_PROCID"] != "0":
                raise SystemExit(0)  # task 0 speaks for the job, and may be about to queue it
            if _WARNING in heard or _is_preempted():
                assert callable(requeue), "submitit handles the signal"
                requeue(_WARNING, None)  # does not come back
        if code:
            raise SystemExit(code)
        return code

    def checkpoint(self, *_: object) -> Any:
        """Called by submitit when the job is queued again: the same task, which resumes from the run's folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(TrainTask(self.arguments, self.folder, self.evaluation_jobs))

    __submitit_checkpoint__ = checkpoint


@contextlib.contextmanager
def _noted_signals() -> Iterator[set[int]]:
    """Give a set that holds, once left, the signals that reached this process, whoever handled them."""
    found: set[int] = set()
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield found
        finally:
            signal.set_wakeup_fd(before)
            with contextlib.suppress(BlockingIOError):
                found.update(reader.recv(4096))


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
