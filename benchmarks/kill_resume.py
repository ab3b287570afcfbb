"""Kill a run at random moments and resume it: `python -m benchmarks.kill_resume [--kills 20] [--json]`.

One run is undisturbed. Another is killed (SIGKILL) repeatedly and resumed by the same command: the whole tree of
processes, the launcher alone, the tree while it writes a checkpoint, or the launcher during start-up. Processes that
outlive a killed launcher are counted. Losses and final weights must equal those of the first run, bit for bit. Needs
/proc (Linux).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from llip.system.program import program

KINDS = ("tree", "launcher", "writing", "start")
"""What is killed: all processes; the launcher; all processes during a checkpoint's writing; the launcher before the
first step."""
START_MOMENTS = (0.5, 6.0)
"""Range of seconds after which a run is killed during start-up, unless its first step comes earlier."""
DEADLINE = 300.0
"""Longest time in seconds from a start to its kill or its end."""
_MARK = "LLIP_KILL_RESUME"
_GONE = 20.0  # seconds after the launcher's end in which the others must end
_STEPS = 8  # per kill: the most steps of a start, and those until it is killed


@dataclasses.dataclass
class Outcome:
    """Result of a killed and resumed run."""

    processes: int
    kills: dict[str, int]  # by kind
    steps: int
    repeated_steps: int  # computed again, because they came after the newest checkpoint
    different_losses: int
    different_weights: int  # tensors
    survivors: int  # processes that outlived their launcher
    seconds: float


class Launched:
    """A command and all its descendants, identified by a variable of their environment, or by the log they write."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.began = time.time()
        self.log = open(log, "ab")  # noqa: SIM115 - as long as the command runs
        self.log_file = os.fstat(self.log.fileno())
        environment = os.environ | {_MARK: self.mark}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    def members(self) -> list[int]:
        """Return the ids of the live processes."""
        processes = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    if state != "Z" and self._includes(folder):
                        processes.append(int(folder.name))
                except OSError:
                    continue  # it has just ended
        return processes

    def _includes(self, folder: Path) -> bool:
        """Return whether the process of a folder of /proc is the command's; a forked one has no variable."""
        marked = f"{_MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
        return marked or os.path.samestat(os.stat(folder / "fd" / "1"), self.log_file)

    def kill(self, kind: str) -> int:
        """Kill, and return the number of processes that outlived the launcher."""
        if kind in ("launcher", "start"):
            self.process.kill()
        else:
            for each in self.members():
                _send(each, signal.SIGKILL)
        self.process.wait(30)
        survivors = 0
        if not wait_for(lambda: not self.members(), _GONE):
            survivors = len(self.members())
            for each in self.members():
                _send(each, signal.SIGKILL)
        self.log.close()
        return survivors

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(DEADLINE)
        finally:
            self.kill("tree")


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition` holds; return False when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.003)
    return True


def logged_steps(folder: Path) -> int:
    """Return the last step in the run's metrics; 0 before the first."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return json.loads(lines[-2])["step"] if len(lines) > 1 else 0  # a line that is being written


def kill_once(command: list[str], folder: Path, kind: str, draw: random.Random, most: int) -> tuple[bool, int]:
    """Start the run and kill it at a random moment.

    Args:
        command: starts or continues the run.
        folder: of the run.
        kind: one of `KINDS`.
        draw: chooses the moment.
        most: steps after which it is killed at the latest.

    Returns:
        (whether it was killed before its end, processes that outlived the launcher)
    """
    begin, launched = logged_steps(folder), Launched(command, folder.parent / f"{folder.name}.txt")

    def reached_step(steps: int) -> bool:
        return logged_steps(folder) >= begin + steps or launched.process.poll() is not None

    target = draw.randint(1, most)
    if kind == "start":
        wait_for(lambda: reached_step(1), draw.uniform(*START_MOMENTS))
        reached = True
    else:
        reached = wait_for(lambda: reached_step(target), DEADLINE)
        if kind == "writing" and reached:
            reached = stop_writing(launched, folder)
        elif reached:
            time.sleep(draw.random() * 0.3)
    ended = launched.process.poll() is not None
    survivors = launched.kill(kind)
    if not reached:
        what = "was not caught writing a checkpoint" if kind == "writing" else f"did not take {target} steps"
        raise RuntimeError(f"the run {what} in {DEADLINE:.0f} s; see {folder}.txt")
    return not ended, survivors


def stop_writing(launched: Launched, folder: Path, seconds: float = DEADLINE) -> bool:
    """Stop all processes of a run (SIGSTOP) while they write a checkpoint.

    A file that an earlier start has left does not count, nor one that is complete before all are stopped.

    Returns:
        Whether they are stopped or the run has ended; False when neither happened in time.
    """
    members = launched.members()  # before: it takes a while

    def writing() -> bool:
        with contextlib.suppress(FileNotFoundError):
            paths = (folder / "checkpoints").glob("*.tmp")
            return any(path.stat().st_mtime > launched.began for path in paths)
        return False

    def caught() -> bool:
        if launched.process.poll() is not None:
            return True
        if not writing():
            return False
        for each in members:
            _send(each, signal.SIGSTOP)
        if writing():
            return True
        for each in members:
            _send(each, signal.SIGCONT)
        return False

    return wait_for(caught, seconds)


def run_killed(
    command: Callable[[str], list[str]], logs: Path, kinds: list[str], seed: int, processes: int, most: int = 6
) -> Outcome:
    """Run once undisturbed and once with kills of the `kinds`, and compare.

    Args:
        command: returns the command of a run by name, which logs every step below `logs`.
        logs: folder of both runs.
        kinds: of the kills, in order.
        seed: of the moments.
        processes: number of processes that the command starts.
        most: largest number of steps between a start and its kill.

    Raises:
        RuntimeError: a run failed or made no progress.
    """
    started = time.monotonic()
    straight, killed = logs / "straight", logs / "killed"
    if code := Launched(command("straight"), logs / "straight.txt").finish():
        raise RuntimeError(f"the undisturbed run ended with exit code {code}; see {logs / 'straight.txt'}")
    draw, done, survivors, repeated = random.Random(seed), dict.fromkeys(KINDS, 0), 0, 0
    progress = tqdm(kinds, desc=f"kills, {processes} processes", unit="kill")
    for kind in progress:
        progress.set_postfix_str(kind)
        interrupted, outlived = kill_once(command("killed"), killed, kind, draw, most)
        if not interrupted:
            break
        done[kind] += 1
        survivors += outlived
        if kind != "start":  # whose steps are those of the start before, which are counted
            repeated += logged_steps(killed) - max(saved_steps(killed), default=0)
    if code := Launched(command("killed"), logs / "killed.txt").finish():
        raise RuntimeError(f"the killed run ended with exit code {code}; see {logs / 'killed.txt'}")
    losses = [read_losses(folder) for folder in (straight, killed)]
    weights = [read_weights(folder) for folder in (straight, killed)]
    return Outcome(
        processes=processes,
        kills=done,
        steps=len(losses[0]),
        repeated_steps=repeated,
        different_losses=sum(losses[0].get(step) != losses[1].get(step) for step in losses[0].keys() | losses[1]),
        different_weights=sum(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()),
        survivors=survivors,
        seconds=time.monotonic() - started,
    )


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the run's checkpoints."""
    return [int(path.stem.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*.pt")]


def read_losses(folder: Path) -> dict[int, float]:
    """Return the loss of every logged step; two lines for one step are an error."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records), f"{folder}: a step is logged twice"
    return {record["step"]: record["loss"] for record in records}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["state_dict"]


def run_command(name: str, logs: Path, processes: int, steps: int) -> list[str]:
    """Return the command of a run of some steps with 16 pairs each; its data lie beside `logs`."""
    fields = {
        "name": name, "logs": logs, "device": "cpu", "ngpus": processes, "batch_size": 16 // processes,
        "train_num_samples": 16 * steps, "epochs": 1, "warmup": 4, "precision": "fp32", "workers": 1, "log_steps": 1,
        "save_steps": 3, "eval_steps": 0, "report_to": "none", "train_data": f"scenes:{logs.parent / 'scenes'}",
    }  # fmt: skip
    return [sys.executable, "-m", "llip.main", "llip_quickstart", *(f"{key}={value}" for key, value in fields.items())]


@program
def main(arguments: Sequence[str]) -> int:
    """Kill and resume with each number of processes; return 1 if losses or weights differ or processes survive."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_resume", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20, help="per number of processes [%(default)s]")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="[1 2]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    given = parser.parse_args(arguments)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="llip-kill-") as folder:
        for processes in given.processes:
            logs = Path(folder) / f"processes_{processes}"
            logs.mkdir()
            kinds = [KINDS[index % len(KINDS)] for index in range(given.kills)]
            steps = _STEPS * (given.kills + 2)

            command = functools.partial(run_command, logs=logs, processes=processes, steps=steps)
            outcomes.append(run_killed(command, logs, kinds, given.seed, processes))
    if given.json:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        print(table(outcomes))
    return 0 if all(is_good(outcome, given.kills) for outcome in outcomes) else 1


def is_good(outcome: Outcome, kills: int) -> bool:
    """Return whether a run was killed as often as requested, lost nothing and left no process."""
    wrong = outcome.different_losses or outcome.different_weights or outcome.survivors
    return not wrong and sum(outcome.kills.values()) == kills


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a table."""
    head = f"kills ({', '.join(KINDS)})"
    rows = [f"processes  {head}  steps  repeated  losses differ  weights differ  survivors"]
    for outcome in outcomes:
        kinds = f"{sum(outcome.kills.values())} ({', '.join(str(outcome.kills[kind]) for kind in KINDS)})"
        rows.append(
            f"{outcome.processes:9}  {kinds:{len(head)}}  {outcome.steps:5}  {outcome.repeated_steps:8}  "
            f"{outcome.different_losses:13}  {outcome.different_weights:14}  {outcome.survivors:9}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
