"""A run's folder, `<logs>/<name>/`: one writer at a time, one experiment for good."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from llip.configs import DERIVED, OPERATIONAL, Config, config_fields
from llip.errors import UserError

METRICS, EVALS = "metrics.jsonl", "evals.jsonl"
LOCK_PATIENCE = 3.0
"""Seconds that a start waits for a folder to become free."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock; the operating system drops it when the process dies, however it dies.

    Raises:
        UserError: the folder cannot be written, or another run holds it.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise UserError(
            f"run folder {str(folder)!r} cannot be written: {error}; choose another with logs=DIR"
        ) from error
    with lock:
        if not _try_lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"run folder {str(folder)!r} is in use by {holder}; wait for it, or choose another with name=NAME"
            )
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    """Take the lock, waiting a moment: the data workers of a killed run hold it too until they notice."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


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
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(config_yaml(config))
    os.replace(temporary, path)
    return notes


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a jsonl file that lie after `step`, so that a resumed run has one line per step."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be torn
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
