"""Watchdog of a run: each process publishes heartbeats and stop requests, and exits when it makes no progress.

A collective waits for all processes and does not report which one is missing. A thread of each process publishes its
step and phase in the store of the rendezvous, so that a process that gives up can name the missing one, and where and
when it was last seen.
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
from llip.training.distributed.signals import StopRequest

PUBLISH_EVERY = 1.0
"""Seconds between two heartbeats."""
_CHECK_EVERY = 0.2  # seconds
_STOP = "stop"  # key of the store: a process has been asked to stop
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe", "Socket Timeout")


class Heartbeat(NamedTuple):
    """State of one process, as it last published it."""

    beat: int  # counts up while the process lives
    step: int
    phase: str
    seconds: float  # in this phase

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} for {self.seconds:.0f} s"


class Watchdog:
    """Publishes this process's heartbeats, and reads those of the others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store | None,
        deadline: float,
        stop: StopRequest,
        report: Callable[[RunError], object],
    ) -> None:
        """Start watching.

        Args:
            rank: of this process.
            world_size: number of processes.
            store: shared by all processes; None for a single one.
            deadline: seconds in one phase after which the process ends the run.
            stop: passed on to the other processes, and received from them.
            report: shows an error to the user before this process exits.
        """
        self.rank, self.world_size, self.store, self.deadline = rank, world_size, store, deadline
        self.stop_request, self.report = stop, report
        self.step, self.phase, self.since, self.patience = 0, "start", time.monotonic(), 1.0
        self._beat = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int, patience: float = 1.0) -> None:
        """Begin a phase.

        Args:
            phase: its name in messages.
            step: of the run.
            patience: how long it may take, in deadlines.
        """
        self.step, self.phase, self.since, self.patience = step, phase, time.monotonic(), patience

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(5)

    def _watch(self) -> None:
        published = 0.0
        while not self._stopped.wait(_CHECK_EVERY):
            self.stop_request.look()
            if time.monotonic() - published >= PUBLISH_EVERY:
                published = time.monotonic()
                self._publish()
            if time.monotonic() - self.since > self.patience * self.deadline:
                self.report(self._stuck())
                sys.stderr.flush()
                os._exit(EXIT_RUN)

    def _publish(self) -> None:
        if self.store is None:
            return
        self._beat += 1
        with contextlib.suppress(RuntimeError):  # the store dies with process 0
            seconds = time.monotonic() - self.since
            self.store.set(f"heartbeat/{self.rank}", f"{self._beat} {self.step} {seconds:.0f} {self.phase}")
            if self.stop_request:
                self.store.set(_STOP, "")
            elif self.store.check([_STOP]):
                self.stop_request.requested = True

    def heartbeats(self) -> dict[int, Heartbeat] | None:
        """Return the newest heartbeat of each process that has published one; None where the store is gone."""
        assert self.store is not None
        beats = {}
        try:
            for rank in range(self.world_size):
                if self.store.check([f"heartbeat/{rank}"]):
                    beat, step, seconds, phase = self.store.get(f"heartbeat/{rank}").decode().split(" ", 3)
                    beats[rank] = Heartbeat(int(beat), int(step), phase, float(seconds))
        except RuntimeError:
            return None
        return beats

    def missing(self) -> str:
        """Return a sentence on which processes have died or are behind; takes a few seconds."""
        before = self.heartbeats()
        time.sleep(2.5 * PUBLISH_EVERY)
        after = self.heartbeats()
        if before is None or after is None:
            return "process 0 is gone, and with it the heartbeats of the others"
        gone = [rank for rank in range(self.world_size) if rank not in after or after[rank] == before.get(rank)]
        gone = [rank for rank in gone if rank != self.rank]
        if gone:
            return "; ".join(
                f"process {rank} is gone, last seen at {after[rank]}"
                if rank in after
                else f"process {rank} never joined"
                for rank in gone
            )
        furthest = max(beat.step for beat in after.values())
        behind = {
            rank: beat
            for rank, beat in after.items()
            if rank != self.rank and (beat.step < furthest or beat.phase != after.get(self.rank, beat).phase)
        }
        if behind:
            return "; ".join(f"process {rank} is at {beat}" for rank, beat in behind.items())
        return f"all {self.world_size} processes are alive and in the same phase"

    def _stuck(self) -> RunError:
        where = Heartbeat(self._beat, self.step, self.phase, time.monotonic() - self.since)
        others = f" The others: {self.missing()}." if self.store is not None else ""
        return RunError(
            f"process {self.rank} is stuck at {where} (deadline {self.patience * self.deadline:.0f} s, set by "
            f"timeout_minutes).{others}"
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a failed collective into one message that names the missing process.

        Raises:
            RunError: a collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not is_lost_peer(error):
                raise
            first_line = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"process {self.rank} lost the others at step {self.step}, {self.phase}: {self.missing()} "
                f"({first_line[:200]})"
            ) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process died or did not answer."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST_PEER)


def name_of_exit(code: int) -> str:
    """Return an exit code of `subprocess` (negative: a signal) in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (often: out of memory)" if -code == signal.SIGKILL else "")
