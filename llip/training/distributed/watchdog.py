"""Who is at what: each process tells where it stands, and ends when it does not move on.

A collective waits for all processes, and does not say which one it waits for. Here a thread of each process publishes
its step and phase in the key-value store through which they found each other, so that whoever gives up can name the
process that is missing, where it was last seen, and since when.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist

from llip.errors import EXIT_RUN, RunError

PUBLISH_EVERY = 1.0
"""Seconds between two heartbeats of life."""
_LOOK_EVERY = 0.2  # seconds
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe", "Socket Timeout")


class Heartbeat(NamedTuple):
    """One process's sign of life."""

    beat: int  # counts up while the process lives
    step: int
    phase: str
    seconds: float  # in this phase

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} for {self.seconds:.0f} s"


class Watchdog:
    """This process's sign of life, and what it knows of the others'."""

    def __init__(
        self,
        rank: int,
        count: int,
        store: dist.Store | None,
        deadline: float,
        tell: Callable[[RunError], None],
    ) -> None:
        """Start watching.

        Args:
            rank: of this process.
            count: of processes.
            store: that all processes share; None for a single one.
            deadline: seconds in one phase after which a process ends the run.
            tell: brings an error to the user, before this process leaves.
        """
        self.rank, self.count, self.store, self.deadline, self.tell = rank, count, store, deadline, tell
        self.step, self.phase, self.since, self.patience = 0, "start", time.monotonic(), 1.0
        self._beat = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int, patience: float = 1.0) -> None:
        """Note what this process begins to do.

        Args:
            phase: a word for people.
            step: of the run.
            patience: times the deadline, what it may take.
        """
        self.step, self.phase, self.since, self.patience = step, phase, time.monotonic(), patience

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(5)

    def _look(self) -> None:
        published = 0.0
        while not self._stopped.wait(_LOOK_EVERY):
            if time.monotonic() - published >= PUBLISH_EVERY:
                published = time.monotonic()
                self._publish()
            if time.monotonic() - self.since > self.patience * self.deadline:
                self.tell(self._stuck())
                sys.stderr.flush()
                os._exit(EXIT_RUN)

    def _publish(self) -> None:
        if self.store is None:
            return
        self._beat += 1
        with contextlib.suppress(RuntimeError):  # the store may have gone with its process
            seconds = time.monotonic() - self.since
            self.store.set(f"sign/{self.rank}", f"{self._beat} {self.step} {seconds:.0f} {self.phase}")

    def heartbeats(self) -> dict[int, Heartbeat] | None:
        """Return the newest sign of every process that has given one; None where the store is gone."""
        assert self.store is not None
        found = {}
        try:
            for rank in range(self.count):
                if self.store.check([f"sign/{rank}"]):
                    beat, step, seconds, phase = self.store.get(f"sign/{rank}").decode().split(" ", 3)
                    found[rank] = Heartbeat(int(beat), int(step), phase, float(seconds))
        except RuntimeError:
            return None
        return found

    def missing(self) -> str:
        """Say which processes have died or are behind, as far as one can know; takes a few seconds."""
        before = self.heartbeats()
        time.sleep(2.5 * PUBLISH_EVERY)
        after = self.heartbeats()
        if before is None or after is None:
            return "process 0 is gone, and with it the record of the others"
        gone = [rank for rank in range(self.count) if rank not in after or after[rank] == before.get(rank)]
        gone = [rank for rank in gone if rank != self.rank]
        if gone:
            return "; ".join(
                f"process {rank} is gone, last seen at {after[rank]}" if rank in after else f"process {rank} never came"
                for rank in gone
            )
        furthest = max(sign.step for sign in after.values())
        behind = {
            rank: sign
            for rank, sign in after.items()
            if rank != self.rank and (sign.step < furthest or sign.phase != after.get(self.rank, sign).phase)
        }
        if behind:
            return "; ".join(f"process {rank} is at {sign}" for rank, sign in behind.items())
        return f"all {self.count} processes are alive and at the same place"

    def _stuck(self) -> RunError:
        where = Heartbeat(self._beat, self.step, self.phase, time.monotonic() - self.since)
        others = f" The others: {self.missing()}." if self.store is not None else ""
        return RunError(
            f"process {self.rank} is stuck at {where} (deadline {self.patience * self.deadline:.0f} s, set by "
            f"timeout_minutes).{others}"
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a collective's failure inside into one sentence that names who is missing.

        Raises:
            RunError: a collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not is_lost_peer(error):
                raise
            first_line = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"process {self.rank} lost the others at step {self.step}, {self.phase}: {self.missing()} "
                f"({first_line[:200]})"
            ) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another process died or did not answer."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PEER)


def name_of_exit(code: int) -> str:
    """Return how a process ended, in words, from the exit code of subprocess (negative: a signal)."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (often: memory ran out)" if -code == signal.SIGKILL else "")
