"""Many shards looked at by several processes: none that dies or hangs takes the others along."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from llip.data.doctor.scan import ScanSettings, ShardFindings, ShardScanner
from llip.system.exit_with_parent import exit_with_parent

WORKER_DIED = "process died reading it"
WORKER_SILENT = "process hung reading it"
_PATIENCE = 60.0  # seconds that a process may be silent beyond the deadline of its reads
_GRACE = 2.0  # seconds


def scan_shards(urls: list[str], settings: ScanSettings, workers: int) -> Iterator[tuple[str, ShardFindings | int]]:
    """Look at `urls` in at most `workers` processes.

    Yields (url, samples so far) now and then and (url, findings) once for each shard, in the order they are done.
    A process that dies or hangs counts as damage of the shard that it was at, and is replaced.
    """
    waiting = list(reversed(urls))
    team = [_Worker(settings) for _ in range(min(workers, len(urls)))]
    try:
        for worker in team:
            worker.begin(waiting.pop())
        while busy := {worker.connection: worker for worker in team if worker.url}:
            answered = multiprocessing.connection.wait(list(busy), timeout=1.0)
            for connection, worker in busy.items():
                url = worker.url
                if connection in answered:
                    answer = worker.answer()
                elif worker.silent() > settings.deadline + _PATIENCE:
                    answer = worker.give_up(WORKER_SILENT, f"no answer for {worker.silent():.0f} s")
                else:
                    continue
                if not isinstance(answer, int):
                    worker.begin(waiting.pop() if waiting else "")
                yield url, answer
    finally:
        for worker in team:
            worker.process.terminate()  # all at once, so that they leave side by side
        for worker in team:
            worker.end()


class _Worker:
    """A process that scans one shard after another, and is restarted when it dies or hangs."""

    def __init__(self, settings: ScanSettings) -> None:
        self.settings = settings
        self.url = ""  # the shard it is at
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # this process has spent seconds on imports; a copy has them
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.settings, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed here
        self.heard = time.monotonic()

    def begin(self, url: str) -> None:
        """Send it to `url`, or to rest if that is ''."""
        self.url, self.heard = url, time.monotonic()
        if url and not self.process.is_alive():
            self._start()
        if url:
            with contextlib.suppress(BrokenPipeError):  # it has just died, which its answer will say
                self.connection.send(url)

    def silent(self) -> float:
        """Return the seconds since it was last heard of."""
        return time.monotonic() - self.heard

    def answer(self) -> ShardFindings | int:
        """Return what it has to say; it must be about to."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE)
            return self.give_up(
                WORKER_DIED, f"exit code {self.process.exitcode}; out of memory, or a crash on an image"
            )
        self.heard = time.monotonic()
        if isinstance(answer, str):
            raise RuntimeError(f"the doctor failed on {self.url}\n{answer}")
        return answer

    def give_up(self, reason: str, detail: str) -> ShardFindings:
        """End the process and return its shard's findings: `reason`."""
        self.end()
        found = ShardFindings(self.url)
        found.count_damage(reason, detail)
        return found

    def end(self) -> None:
        """End the process; it gets a moment to end the commands that it has started."""
        self.process.terminate()
        self.process.join(_GRACE)
        self.process.kill()
        self.process.join(_GRACE)
        self.connection.close()


def _work(connection: Connection, settings: ScanSettings, parent: int) -> None:
    exit_with_parent(parent, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # unwinds: readers end their commands
    warnings.simplefilter("ignore")  # PIL's, on odd images; what matters is counted
    torch.set_num_threads(1)
    scanner = ShardScanner(settings)
    while True:
        url = connection.recv()
        try:
            answer: ShardFindings | str = scanner.scan(url, connection.send)
        except Exception:  # a bug of ours: its traceback belongs to the parent
            answer = traceback.format_exc()
        connection.send(answer)
