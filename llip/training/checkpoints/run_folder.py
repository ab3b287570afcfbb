"""A run's folder, `<logs>/<name>/`: one writer at a time, and a single experiment."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llip.configs import DERIVED, OPERATIONAL, Config, config_fields
from llip.errors import UserError
from llip.extensions import SHIPPED, portable_name
from llip.system.files import write_text
from llip.system.locks import held_lock

LOCK_PATIENCE = 3.0
"""Seconds to wait for a run folder: the data workers of a killed run hold its lock until they notice."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock, which the operating system releases when the process dies.

    Raises:
        UserError: the folder cannot be written, its file system has no locks, or another run holds it.
    """
    what, fix = f"run folder {str(folder)!r}", "choose another with logs=DIR or name=NAME"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error}; {fix}") from error
    with held_lock(folder / ".lock", what, fix, LOCK_PATIENCE):
        yield


def config_yaml(config: Config) -> str:
    """Return the resolved config as YAML, with derived values as comments."""
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
    """Return the fields that define the experiment, with the global batch instead of its factors."""
    kinds = {name: field.metadata["kind"] for name, field in config_fields().items()}
    identity = {name: value for name, value in fields.items() if kinds.get(name) not in (OPERATIONAL, DERIVED)}
    identity |= {name: portable_name(value) for name, value in identity.items() if name in SHIPPED}
    identity["global batch"] = fields["batch_size"] * fields["nodes"] * fields["ngpus"] * fields["accum_freq"]
    return identity


def _read_config(path: Path) -> dict[str, Any]:
    """Return the fields of a run's `config.yaml`, with defaults for those that an older version lacks."""
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeError):
        fields = None
    defaults = {name: field.default for name, field in config_fields().items()}
    values = defaults | fields if isinstance(fields, dict) else {}
    if not all(isinstance(values.get(name), int) for name in ("epochs", "batch_size", "nodes", "ngpus", "accum_freq")):
        raise UserError(f"{path} is damaged; expected the run's config as YAML. Remove it to use this config")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `name: before -> now` for each entry that has changed."""
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        or isinstance(before.get(name), bool) != isinstance(now.get(name), bool)  # True == 1
    ]


def claim_folder(folder: Path, config: Config, started: bool) -> list[str]:
    """Compare the config with that of an earlier start, and write `config.yaml`.

    Args:
        folder: the run's folder, locked.
        config: the run's config.
        started: whether the folder holds a checkpoint; if not, the config replaces the old one.

    Returns:
        Messages about operational fields that changed, and about the schedule where `epochs` grows.

    Raises:
        UserError: the folder belongs to another experiment; lists field, old and new.
        OSError: `config.yaml` cannot be read or written; names it.
    """
    path, messages = folder / "config.yaml", []
    if started and path.is_file():
        old, new = _read_config(path), yaml.safe_load(config_yaml(config))
        before, now = _identity(old), _identity(new)
        if now["epochs"] > before["epochs"]:
            messages.append(
                f"epochs grows from {before['epochs']} to {now['epochs']}: the cosine is stretched, so the learning "
                "rate jumps up to the longer schedule's and the run differs from one planned for that length"
            )
            before["epochs"] = now["epochs"]
        if changed := differences(before, now):
            raise UserError(
                f"run folder {str(folder)!r} belongs to another experiment ({'; '.join(changed)}); "
                "use the old values, or choose another folder with name=NAME"
            )
        messages += [
            f"{name} changed from {old.get(name)!r} to {new[name]!r}"
            for name, field in config_fields().items()
            if field.metadata["kind"] != "identity" and old.get(name) != new[name]
        ]
    write_text(path, config_yaml(config))
    return messages
