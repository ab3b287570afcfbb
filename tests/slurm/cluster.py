"""A real Slurm cluster for the tests: what is asked of it, always with a deadline."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.forked import ROOT, run_forked

DEADLINE = 150.0
"""Seconds within which a job must get where it is waited for."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Slurm's commands, with the variables that lead to the cluster."""

    def __init__(self, configuration: Path) -> None:
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": str(configuration), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        return subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE, check=False
        )

    def program(self, *words: str) -> subprocess.CompletedProcess:
        """Run a program of the project to its end, forked."""
        return run_forked(sys.executable, *words, env=self.environment, cwd=ROOT, timeout=DEADLINE)

    def submit(self, *words: str, checkout: Path = ROOT) -> tuple[str, str]:
        """Run a program that submits a job; returns the job's id and what was printed."""
        if checkout == ROOT:
            done = self.program(*words)
        else:
            done = self.command(sys.executable, *words, cwd=checkout)
        assert done.returncode == 0, done.stderr + done.stdout
        found = re.search(r"^job (\d+):", done.stdout, re.MULTILINE)
        assert found, done.stdout
        return found[1], done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        done = self.command("scontrol", "--oneliner", "show", "job", job)
        assert done.returncode == 0, done.stderr
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def wait_ended(self, job: str) -> dict[str, str]:
        """Wait until a job has ended for good, and return its fields."""
        wait_until(lambda: self.job(job)["JobState"] in ENDED, f"the end of job {job}")
        return self.job(job)

    @staticmethod
    def last_words(run: Path) -> str:
        """Return the end of what a run's first task said."""
        return "\n".join(path.read_text()[-2000:] for path in (run / "slurm").glob("*_0_log.err"))


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Wait for something, and fail when it does not come."""
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end, f"{what} did not come within {DEADLINE:.0f} s"
        time.sleep(0.1)


def read_lines(path: Path) -> list[dict]:
    """Return the whole lines of a jsonl file that may be growing, none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every logged step."""
    return [(line["step"], line["loss"]) for line in read_lines(run / "metrics.jsonl")]
