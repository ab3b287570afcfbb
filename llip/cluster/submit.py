"""Jobs: submitted to SLURM through submitit, and what is printed about them."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from llip.errors import UserError

SBATCH_DEADLINE = 120
"""Seconds that sbatch may take to answer."""


class _Executor(SlurmExecutor):
    """submitit's executor; writes a script where there is no SLURM, and has a deadline for sbatch."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # available: `check_slurm` looks for srun before a submission

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(SBATCH_DEADLINE), *super()._make_submission_command(submission_file_path)]


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """One job, or an array of them when there are several tasks.

    Attributes:
        logs: folder of SLURM's logs.
        parameters: submitit's, see `options.sbatch_parameters`.
        tasks: a callable for each element of the array, run by each of its tasks.
        max_timeouts: how often the job is requeued.
    """

    logs: Path
    parameters: dict[str, Any]
    tasks: Sequence[Callable[[], int]]
    max_timeouts: int

    def _executor(self) -> _Executor:
        executor = _Executor(folder=self.logs.absolute(), max_num_timeout=self.max_timeouts)
        executor.update_parameters(**self.parameters)
        return executor

    def script(self) -> str:
        """Return sbatch's script."""
        executor = self._executor()
        if len(self.tasks) > 1:
            executor.parameters["map_count"] = len(self.tasks)
        return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")

    def submit(self) -> list[str]:
        """Submit the job and return its id, or those of the array's elements.

        Raises:
            UserError: SLURM refuses it, or does not answer.
        """
        try:
            with _outside_any_job():
                executor = self._executor()
                if len(self.tasks) == 1:
                    return [executor.submit(self.tasks[0]).job_id]
                with executor.batch():
                    jobs = [executor.submit(task) for task in self.tasks]
                return [job.job_id for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            reason = str(error).strip() or f"no answer within {SBATCH_DEADLINE} seconds"
            hint = "; use device=cpu on nodes without GPUs" if "gres" in reason or "gpu" in reason.lower() else ""
            raise UserError(f"SLURM does not accept the job: {reason}{hint}") from error
        except OSError as error:
            raise UserError(f"the job cannot be written to {self.logs}: {error}") from error


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Hide the variables of the job that this process may be part of, which sbatch would read as options."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env(extra_names=("GLOO_SOCKET_IFNAME",)):
        os.environ.update(configuration)  # it locates SLURM
        yield


def print_submitted(ids: Sequence[str], logs: Path, what: str, follow: Path | None, again: str) -> None:
    """Print the jobs' ids, where their logs are, and how to follow, cancel and continue.

    Args:
        ids: of the jobs.
        logs: folder of SLURM's logs.
        what: what was submitted, in words.
        follow: a file that grows while the job runs; None: the first job's log.
        again: the command that continues it.
    """
    first = logs.absolute() / f"{ids[0]}_0_log.err"
    job = ids[0].partition("_")[0]
    print(f"job {job}: {what}")
    print(f"logs:     {first} (messages) and .out, one pair for each task")
    print(f"follow:   squeue -j {job}; tail -F {follow or first}")
    print(f"cancel:   scancel {job}")
    print(f"continue: {again}")


def counted(number: int, thing: str) -> str:
    """Return `1 task`, `2 tasks`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def print_notes(notes: Sequence[str]) -> None:
    """Print what was not checked to standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return the user's command, quoted for a shell."""
    return shlex.join([*program.split(), *map(os.fspath, arguments)])
