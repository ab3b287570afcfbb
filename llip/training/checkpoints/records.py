"""A run's jsonl records: an object per line; incomplete lines are dropped, those that do not fit on the disk lost."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llip.system.files import write_text
from llip.system.locks import try_lock

log = logging.getLogger(__name__)

METRICS, EVALS = "metrics.jsonl", "evals.jsonl"
RECORDS_PATIENCE = 60.0
"""Seconds to wait for the lock of the run's evaluations, which other processes hold briefly."""


@contextlib.contextmanager
def locked_evaluations(folder: Path) -> Iterator[None]:
    """Lock `evals.jsonl`, which a run and the jobs that evaluate its weights write.

    Raises:
        OSError: another process holds it for too long, or the folder cannot be written.
    """
    with open(folder / ".evals.lock", "a") as lock:
        if not try_lock(lock, RECORDS_PATIENCE):
            raise TimeoutError(
                errno.ETIMEDOUT, f"in use by another process for {RECORDS_PATIENCE:.0f} s", str(folder / EVALS)
            )
        yield


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a jsonl file, none where there is no file; incomplete or damaged lines are skipped.

    Raises:
        OSError: the file cannot be read.
    """
    return [record for line in _lines(path) if (record := _parsed(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed read names no file
        raise


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a line's record; None for what a killed run or a failing disk leaves instead."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a complete line to a jsonl file, or nothing; it replaces an incomplete line of a killed process.

    Raises:
        OSError: the disk cannot take it.
    """
    line = json.dumps(record).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
        try:
            while line:  # a disk with little room first takes a part
                line = line[file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def cut_back(path: Path, step: int) -> None:
    """Drop incomplete lines and those after `step` from a jsonl file, so that a resumed run has one line per step.

    Raises:
        OSError: the disk cannot take it; names the file.
    """
    if path.is_file():
        keep_records(path, lambda record: record["step"] <= step)


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool], more: dict[str, Any] | None = None) -> None:
    """Rewrite a jsonl file with the records that are `wanted`, and one `more`.

    Raises:
        OSError: the disk cannot take it; names the file.
    """
    lines = [line for line in _lines(path) if (record := _parsed(line)) is not None and wanted(record)]
    lines += [] if more is None else [json.dumps(more)]
    write_text(path, "".join(line + "\n" for line in lines))


class BestEffort:
    """Lets writes to a file fail during a run: one warning when records begin to be lost, one when it is over."""

    def __init__(self, name: str) -> None:
        """Guard the file that warnings call `name`."""
        self.name, self.lost = name, 0

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Write one record inside; where the disk fails, warn and drop the record."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                log.warning(
                    "%s cannot be written: %s. Training continues and retries; records that do not fit are lost",
                    self.name,
                    error,
                )
            self.lost += 1
            return
        if self.lost:
            log.warning("%s can be written again; %d records are lost", self.name, self.lost)
        self.lost = 0

    def close(self) -> None:
        """Warn about records that are lost at the end."""
        if self.lost:
            log.warning("%s lacks the last %d records", self.name, self.lost)
