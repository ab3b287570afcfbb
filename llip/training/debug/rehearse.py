"""Rehearse an interruption: `llip rehearse <config> [field=value ...] [--steps 20]`.

Trains a few steps of the config in a temporary folder, stops the run as a cluster would (SIGUSR2), continues it, and
reports the times on this machine: how long before its end a job must be signalled so that nothing is lost.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from llip.config_search import search_config
from llip.configs import Config
from llip.errors import EXIT_STOPPED, RunError, UserError
from llip.system.program import program

_WRITTEN = re.compile(r"checkpoint of step \d+ written in ([\d.]+) s")
_FIRST_BATCH = re.compile(r"data: the first batch came after ([\d.]+) s")
_ENDING = 600.0  # seconds that a run may take from the signal to its end


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was measured, in seconds."""

    step: float  # median, without the wait for data
    longest_step: float  # likewise
    start: float  # from the command to the first step
    restart: float  # the same, for a run that resumes
    first_batch: float  # of the start: waiting for data
    fast_forward: float  # of the restart: waiting for data
    write: float  # a checkpoint, the longest
    stop: float  # from the signal to the end of the last process
    signal_margin: int  # option of the submission


def margin(longest_step: float, write: float, stop: float) -> int:
    """Return the seconds before its end at which to signal a job: twice what stopping took here, or could take.

    The signal may come at the beginning of the longest step, after its wait for data; another half minute is for a file
    system with more to do.
    """
    return math.ceil(2 * max(stop, longest_step + write)) + 30


class _Run:
    """One start of the run."""

    def __init__(self, words: list[str], folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.known = len(self._records())
        self.began = time.monotonic()
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "llip.main", *words]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def _records(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be incomplete

    def wait_for_steps(self, count: int, deadline: float) -> tuple[float, list[float]]:
        """Return (seconds to the first step, seconds of each later one without its wait for data)."""
        times: list[float] = []
        progress = tqdm(total=count, desc="steps", unit="step", leave=False)
        with progress:
            while len(times) < count:
                new = len(self._records()) - self.known - len(times)
                times += [time.monotonic()] * max(0, new)
                if new > 0:
                    progress.update(new)
                if self.process.poll() is not None and new <= 0:
                    self._fail(f"ended with exit code {self.process.returncode}")
                if time.monotonic() - self.began > deadline:
                    self._fail(f"did not reach step {count} within {deadline:.0f} s (--deadline)")
                time.sleep(0.02)
        logged = [(record["seconds"], record["data_wait_fraction"]) for record in self._records()[self.known :]]
        return times[0] - self.began, [(end - begin) * (1 - wait) for (begin, _), (end, wait) in pairwise(logged)]

    def ask_to_stop(self) -> float:
        """Send SIGUSR2 and return the seconds until the run has ended."""
        asked = time.monotonic()
        self.process.send_signal(signal.SIGUSR2)
        try:
            code = self.process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._fail(f"has not ended {_ENDING:.0f} s after SIGUSR2")
        if code not in (EXIT_STOPPED, 0):
            self._fail(f"ended with exit code {code} after SIGUSR2, expected {EXIT_STOPPED}")
        return time.monotonic() - asked

    def end(self) -> None:
        """Kill the run if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its processes end with it
            self.process.wait(30)

    def largest(self, pattern: re.Pattern[str]) -> float:
        """Return the largest number that `pattern` matches in the run's output, 0 without one."""
        return max(map(float, pattern.findall(self.log.read_text(errors="replace"))), default=0.0)

    def _fail(self, what: str) -> None:
        self.end()
        tail = "\n".join(self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-8:])
        raise RunError(f"the rehearsed run {what}; the end of its output:\n{tail}")


def rehearse(words: list[str], config: Config, steps: int, deadline: float, folder: Path) -> Rehearsal:
    """Start, signal, continue and signal again.

    Args:
        words: arguments of `llip.main`, which resolve to `config`.
        config: with `name` and `logs` of the rehearsal.
        steps: trained before each signal.
        deadline: seconds for them.
        folder: of the runs' output.

    Raises:
        RunError: a run failed or was too slow.
    """
    first = _Run(words, config.folder, folder / "first.txt")
    try:
        start, seconds = first.wait_for_steps(steps, deadline)
        stop = first.ask_to_stop()
    finally:
        first.end()
    second = _Run(words, config.folder, folder / "second.txt")
    try:
        restart, more = second.wait_for_steps(steps, deadline)
        stop = max(stop, second.ask_to_stop())
    finally:
        second.end()
    seconds += more
    write = max(first.largest(_WRITTEN), second.largest(_WRITTEN))
    return Rehearsal(
        step=statistics.median(seconds),
        longest_step=max(seconds),
        start=start,
        restart=restart,
        first_batch=first.largest(_FIRST_BATCH),
        fast_forward=second.largest(_FIRST_BATCH),
        write=write,
        stop=stop,
        signal_margin=margin(max(seconds), write, stop),
    )


def table(result: Rehearsal) -> str:
    """Return the result as a table."""
    rows = [
        ("step without its wait for data, median", result.step),
        ("step without its wait for data, longest", result.longest_step),
        ("start, to the first step", result.start),
        ("restart, to the first step", result.restart),
        ("first batch after the start", result.first_batch),
        ("first batch after the restart (fast-forward)", result.fast_forward),
        ("writing and verifying a checkpoint", result.write),
        ("from the signal to the end of the run", result.stop),
    ]
    lines = [f"{name:46} {seconds:8.2f} s" for name, seconds in rows]
    lines.append(f"\nlet the cluster signal the job {result.signal_margin} s before its end:")
    lines.append(f"  python submitit_openclip.py ... --signal-margin {result.signal_margin}")
    return "\n".join(lines)


@program
def main(arguments: Sequence[str]) -> None:
    """Rehearse a config and print what it takes."""
    parser = argparse.ArgumentParser(prog="llip rehearse", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="a config's name, or path/to/file.py:function")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument("--steps", type=int, default=20, help="trained before each signal [%(default)s]")
    parser.add_argument("--deadline", type=float, default=1800, help="seconds for them [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    given = parser.parse_intermixed_args(arguments)
    result = _rehearse(given)
    print(json.dumps(dataclasses.asdict(result)) if given.json else table(result))


def _rehearse(given: argparse.Namespace) -> Rehearsal:
    config = search_config(given.config, given.overrides)
    if config.nodes > 1:
        raise UserError(f"config {config.name} asks for {config.nodes} nodes; rehearse on one of them with nodes=1")
    if given.steps < 2:
        raise UserError(f"--steps {given.steps}: expected at least 2")
    fixed = {"name": f"{config.name}_rehearsal_{os.getpid()}", "log_steps": "1", "save_steps": "0", "eval_steps": "0",
           "save_frequency": "0", "report_to": "none"}  # fmt: skip
    kept = [word for word in given.overrides if word.partition("=")[0] not in fixed]
    words = [given.config, *kept, *(f"{name}={value}" for name, value in fixed.items())]
    config = search_config(given.config, words[1:])
    if config.total_steps <= 2 * given.steps:
        raise UserError(f"config {config.name} has {config.total_steps} steps; give --steps below half of them")
    config.folder.mkdir(parents=True, exist_ok=True)
    try:
        return rehearse(words, config, given.steps, given.deadline, config.folder)
    finally:
        shutil.rmtree(config.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
