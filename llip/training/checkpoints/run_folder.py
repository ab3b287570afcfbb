"""A run's folder, `<logs>/<name>/`: one writer at a time, one experiment for good."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from llip.configs import DERIVED, OPERATIONAL, Config, config_fields
from llip.errors import UserError

log = logging.getLogger(__name__)

METRICS, EVALS = "metrics.jsonl", "evals.jsonl"
LOCK_PATIENCE = 3.0
"""Seconds that a start waits for a folder to become free."""
RECORDS_PATIENCE = 60.0
"""Seconds that a process waits for the run's evaluations, which others hold for moments."""
_BUSY = (errno.EAGAIN, errno.EACCES)  # what flock answers where another process holds the lock


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock; the operating system drops it when the process dies, however it dies.

    Raises:
        UserError: the folder cannot be written, its file system has no locks, or another run holds it.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise UserError(
            f"run folder {str(folder)!r} cannot be written: {error}; choose another with logs=DIR"
        ) from error
    with lock:
        try:
            free = _try_lock(lock, LOCK_PATIENCE)
        except OSError as error:
            raise UserError(
                f"run folder {str(folder)!r} cannot be locked: {error}. It lies on {_file_system(folder)}, which "
                "should let programs lock files: mount it so (Lustre: flock; NFS: without nolock), or choose another "
                "with logs=DIR"
            ) from error
        if not free:
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "another process"
            raise UserError(
                f"run folder {str(folder)!r} is in use by {holder}; wait for it, or choose another with name=NAME"
            )
        with contextlib.suppress(OSError):  # a full disk: only the message to others has no name then
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


def _try_lock(file: IO[Any], patience: float) -> bool:
    """Take the lock, waiting up to `patience` seconds: the data workers of a killed run hold it until they notice.

    Raises:
        OSError: the file system does not lock files.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def _file_system(folder: Path) -> str:
    """Name the kind and the place of the file system that a folder lies on, where Linux tells."""
    name, longest = "a file system of unknown kind", 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
            _, place, kind, *_ = line.split()
            mount = Path(place.replace("\\040", " "))
            if folder.resolve().is_relative_to(mount) and len(mount.parts) >= longest:
                name, longest = f"{kind} at {mount}", len(mount.parts)
    return name


@contextlib.contextmanager
def locked_evaluations(folder: Path) -> Iterator[None]:
    """Hold `evals.jsonl`, which a run and the jobs that evaluate its weights write.

    Raises:
        OSError: another process holds it for too long, or the folder cannot be written.
    """
    with open(folder / ".evals.lock", "a") as lock:
        if not _try_lock(lock, RECORDS_PATIENCE):
            raise TimeoutError(
                errno.ETIMEDOUT, f"in use by another process for {RECORDS_PATIENCE:.0f} s", str(folder / EVALS)
            )
        yield


def config_yaml(config: Config) -> str:
    """Return the resolved config as YAML, with the values that follow from it as comments."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }
    derived = {
        "processes": f"{config.nodes} nodes x {config.ngpus} = {config.processes}",
        "global batch": f"{config.global_batch:,} pairs",
        "steps per epoch": f"{config.steps_per_epoch:,}",
        "steps": f"{config.total_steps:,}",
        "pairs seen": f"{config.total_steps * config.global_batch:,}",
    }
    comments = "".join(f"# {name}: {value}\n" for name, value in derived.items())
    return yaml.safe_dump(fields, sort_keys=False, width=1000) + comments


def _identity(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what makes the experiment: identity fields, and the global batch in the place of its factors."""
    kinds = {name: field.metadata["kind"] for name, field in config_fields().items()}
    identity = {name: value for name, value in fields.items() if kinds.get(name) not in (OPERATIONAL, DERIVED)}
    identity["global batch"] = fields["batch_size"] * fields["nodes"] * fields["ngpus"] * fields["accum_freq"]
    return identity


def _default(field: dataclasses.Field) -> Any:
    return list(field.default) if isinstance(field.default, tuple) else field.default


def claim_folder(folder: Path, config: Config, started: bool) -> list[str]:
    """Write `config.yaml`, having compared it with the one that is there.

    Args:
        folder: the run's folder, locked.
        config: the run's config.
        started: whether the folder holds a checkpoint; if not, another config simply replaces the old one.

    Returns:
        Sentences about operational fields that changed, and about what more epochs do to the schedule.

    Raises:
        UserError: the folder belongs to another experiment; lists field, old and new.
        OSError: `config.yaml` cannot be read or written; names it.
    """
    path, notes = folder / "config.yaml", []
    if started and path.is_file():
        try:
            old = yaml.safe_load(path.read_text())
            assert isinstance(old, dict)
            old = {name: _default(field) for name, field in config_fields().items()} | old  # of an older version
        except (yaml.YAMLError, AssertionError) as error:
            raise UserError(f"{path} is damaged; it should describe the run. Remove it to use this config") from error
        new = yaml.safe_load(config_yaml(config))
        before, now = _identity(old), _identity(new)
        if now["epochs"] > before.get("epochs", 0):
            notes.append(
                f"epochs grows from {before['epochs']} to {now['epochs']}: the cosine is stretched, so the learning "
                "rate jumps up to the longer schedule's and the run differs from one planned for that length"
            )
            before["epochs"] = now["epochs"]
        changed = [
            f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"run folder {str(folder)!r} belongs to another experiment ({'; '.join(changed)}); "
                "give the old values, or choose another folder with name=NAME"
            )
        notes += [
            f"{name} changed from {old.get(name)!r} to {new[name]!r}"
            for name, field in config_fields().items()
            if field.metadata["kind"] != "identity" and old.get(name) != new[name]
        ]
    replace_text(path, config_yaml(config))
    return notes


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; one that holds the text already is left alone, so a full disk is no matter.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.is_file() and path.read_bytes() == text.encode():
            return
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _raise_for(path, error)


def _raise_for(path: Path, error: OSError) -> NoReturn:
    """Raise an error again with the name of its file, which the failure of a write does not have."""
    error.filename = error.filename or str(path)
    raise error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a jsonl file, none where there is no file; a line that is torn or damaged is left out.

    Raises:
        OSError: the file cannot be read.
    """
    return [record for line in _lines(path) if (record := _parsed(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        _raise_for(path, error)


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a line's record; None for what a killed run or a failing disk leaves instead of one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a jsonl file: whole, or not at all; after half a line of a killed process too.

    Raises:
        OSError: the disk does not take it.
    """
    line = json.dumps(record).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
        try:
            while line:  # a disk with little room takes a part first
                line = line[file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


class BestEffort:
    """Lets a file of records fail in the middle of a run: one warning when a gap begins, one when it ends."""

    def __init__(self, what: str) -> None:
        """Watchdog over what the warnings call `what`."""
        self.what, self.lost = what, 0

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Write one record; an error of the disk is told, and the record is lost."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                log.warning(
                    "%s cannot be written: %s. Training goes on, tries again each time, and loses what does not fit",
                    self.what,
                    error,
                )
            self.lost += 1
            return
        if self.lost:
            log.warning("%s can be written again; %d records are lost", self.what, self.lost)
        self.lost = 0

    def close(self) -> None:
        """Say what is lost where a gap lasts to the end."""
        if self.lost:
            log.warning("%s lacks the last %d records", self.what, self.lost)


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a jsonl file that lie after `step` or are torn, so that a resumed run has one line per step.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    if path.is_file():
        keep_records(path, lambda record: record["step"] <= step)


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool], more: dict[str, Any] | None = None) -> None:
    """Rewrite a jsonl file with the records that are `wanted`, and perhaps one `more`.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    lines = [line for line in _lines(path) if (record := _parsed(line)) is not None and wanted(record)]
    lines += [] if more is None else [json.dumps(more)]
    replace_text(path, "".join(line + "\n" for line in lines))
