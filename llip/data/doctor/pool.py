"""Scan shards in parallel, each in a process: one that dies or hangs costs its own shard only."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

import torch

from llip.data.doctor.scan import ScanSettings, ShardFindings, ShardScanner
from llip.system.exit_with_parent import exit_with_parent

WORKER_DIED = "process died reading it"
WORKER_SILENT = "process hung reading it"
_PATIENCE = 60.0  # seconds that a process may be silent beyond the deadline of its reads
_GRACE = 2.0  # seconds that a process gets to end the commands that it has started


def scan_shards(urls: list[str], settings: ScanSettings, workers: int) -> Iterator[tuple[str, ShardFindings | int]]:
    """Scan `urls` in at most `workers` processes at a time.

    Yields (url, samples so far) now and then and (url, findings) once for each shard, in the order of completion.
    A process that dies or hangs is damage of its shard.
    """
    scanner, waiting = ShardScanner(settings), list(reversed(urls))
    running: dict[Connection, _Scan] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                scan = _Scan(waiting.pop(), scanner)
                running[scan.connection] = scan
            answered = wait(list(running), timeout=1.0)
            for connection, scan in list(running.items()):
                if connection in answered:
                    answer = scan.receive()
                elif scan.silent() > settings.deadline + _PATIENCE:
                    answer = scan.failed(WORKER_SILENT, f"no answer for {scan.silent():.0f} s")
                else:
                    continue
                if not isinstance(answer, int):
                    running.pop(connection).end()
                yield scan.url, answer
    finally:
        for scan in running.values():
            scan.process.terminate()  # all of them first, so that they end at the same time
        for scan in running.values():
            scan.end()


class _Scan:
    """A process that scans one shard. It is forked: imports, which take seconds, are done."""

    def __init__(self, url: str, scanner: ShardScanner) -> None:
        context = multiprocessing.get_context("fork")
        self.url, self.heard = url, time.monotonic()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(url, scanner, theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # the process holds the only other end: its death is the end of the file

    def silent(self) -> float:
        """Return the seconds since the last answer."""
        return time.monotonic() - self.heard

    def receive(self) -> ShardFindings | int:
        """Return the answer that has arrived."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE)
            return self.failed(WORKER_DIED, f"exit code {self.process.exitcode}; out of memory, or a crash on an image")
        self.heard = time.monotonic()
        if isinstance(answer, str):
            raise RuntimeError(f"the doctor failed on {self.url}\n{answer}")
        return answer

    def failed(self, reason: str, detail: str) -> ShardFindings:
        """Return findings of the shard that are this failure alone."""
        findings = ShardFindings(self.url)
        findings.count_damage(reason, detail)
        return findings

    def end(self) -> None:
        """End the process, if need be by force."""
        self.process.terminate()
        self.process.join(_GRACE)
        self.process.kill()
        self.process.join(_GRACE)
        self.connection.close()


def _work(url: str, scanner: ShardScanner, connection: Connection, parent: int) -> None:
    exit_with_parent(parent, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it and ends this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # unwinds: readers end their commands
    warnings.simplefilter("ignore")  # PIL's, on odd images; what matters is counted
    torch.set_num_threads(1)
    try:
        answer: ShardFindings | str = scanner.scan(url, connection.send)
    except Exception:  # a bug of ours: its traceback belongs to the parent
        answer = traceback.format_exc()
    connection.send(answer)
