"""How many samples each shard holds, so that a loader need not read to know: `llip-index.json`.

The file lies beside the shards and names them by file name, or in a chosen folder and names them by absolute path or
URL, so that one folder can serve many datasets. `llip doctor PATTERN --index` writes it, and so does a run that has to
count shards for long.

    {"version": 1, "shards": {"00000.tar": {"samples": 998, "damaged": 2, "bytes": 41943040, "mtime_ns": 17...}}}

`samples` counts what `tar_reader.read_samples` yields, usable or not; `damaged` is how many of them are known to be
unusable, plus damage outside samples. A local shard's entry holds while the file has its size and time of change; a
remote one is known by its URL alone. Without an index, img2dataset's `00000_stats.json` serves as a count: that of the
download, which is not checked against the shard.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llip.data.sources import is_local
from llip.errors import UserError
from llip.system.files import write_text

INDEX_NAME = "llip-index.json"
_VERSION = 1
_STATISTICS = "_stats.json"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """What the index knows of one shard; `bytes` and `mtime_ns` are those of its file, None for a remote one."""

    samples: int
    damaged: int = 0
    bytes: int | None = None
    mtime_ns: int | None = None


def describe_shard(url: str, samples: int, damaged: int) -> ShardEntry:
    """Return the entry of a shard as it is now.

    Raises:
        OSError: a local shard is not there any more.
    """
    if not is_local(url):
        return ShardEntry(samples, damaged)
    status = os.stat(url)
    return ShardEntry(samples, damaged, status.st_size, status.st_mtime_ns)


def write_index(entries: Mapping[str, ShardEntry], folder: str | Path | None = None) -> list[Path]:
    """Write `entries` (by URL) beside their shards, or into `folder`, and return the files written.

    Entries of other shards that are there already stay. A file appears whole or not at all.

    Raises:
        UserError: a folder cannot be written to, or a remote shard is to have its entry beside it.
    """
    by_file: dict[Path, dict[str, ShardEntry]] = {}
    for url, entry in entries.items():
        if folder is None and not is_local(url):
            raise UserError(f"index: {url!r} is not on this machine; choose a folder for the index with --index-dir")
        path, name = _place(url, folder)
        by_file.setdefault(path, {})[name] = entry
    for path, named in by_file.items():
        merged = {**_read(path), **named}
        shards = {name: dataclasses.asdict(merged[name]) for name in sorted(merged)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"version": _VERSION, "shards": shards}, indent=0) + "\n")
        except OSError as error:
            raise UserError(
                f"index: cannot write {path} ({error.strerror}); choose another folder for it with --index-dir"
            ) from error
    return list(by_file)


def load_index(urls: Iterable[str], folder: str | Path | None = None) -> dict[str, int]:
    """Return the samples by URL, as far as an index in `folder` or beside the shards, or img2dataset, has counted them.

    Entries older than their shards, and files that are no index, are ignored with a warning.
    """
    read, list_statistics = functools.cache(_read), functools.cache(_list_statistics)
    samples: dict[str, int] = {}
    stale = []
    for url in urls:
        folders = [folder] * (folder is not None) + [None] * is_local(url)
        entries = [read(path).get(name) for path, name in (_place(url, chosen) for chosen in folders)]
        valid = next((entry for entry in entries if entry is not None and _holds(url, entry)), None)
        if valid is not None:
            samples[url] = valid.samples
        elif any(entries):
            stale.append(url)
        elif is_local(url) and f"{Path(url).stem}{_STATISTICS}" in list_statistics(Path(url).parent):
            samples |= _img2dataset_count(url)
    if stale:
        logger.warning(
            "index: %d shards have changed since they were indexed, the first is %s; "
            "llip doctor PATTERN --index counts them again",
            len(stale),
            stale[0],
        )
    return samples


def _place(url: str, folder: str | Path | None) -> tuple[Path, str]:
    """Return the index file that a shard belongs into, and its name there."""
    if folder is None:
        return Path(url).parent / INDEX_NAME, Path(url).name
    return Path(folder) / INDEX_NAME, os.path.abspath(url) if is_local(url) else url


def _holds(url: str, entry: ShardEntry) -> bool:
    """Return whether a shard is as it was when it was counted."""
    try:
        return describe_shard(url, entry.samples, entry.damaged) == entry
    except OSError:
        return False


def _read(path: Path) -> dict[str, ShardEntry]:
    content = _read_json(path)
    if content is None:
        return {}
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or content.get("version") != _VERSION:
        logger.warning("index: %s is ignored: it is not an index of version %d", path, _VERSION)
        return {}
    entries = {name: entry for name, values in shards.items() if (entry := _entry(values))}
    if len(entries) < len(shards):
        logger.warning("index: %s has %d entries of another form, which are ignored", path, len(shards) - len(entries))
    return entries


def _entry(values: Any) -> ShardEntry | None:
    try:
        entry = ShardEntry(**values)
    except TypeError:
        return None
    known = [value for value in dataclasses.astuple(entry) if value is not None]
    return entry if entry.samples is not None and all(map(_is_count, known)) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list_statistics(folder: Path) -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(folder) if name.endswith(_STATISTICS))
    except OSError:
        return frozenset()


def _img2dataset_count(url: str) -> dict[str, int]:
    """Return the samples by URL, empty where the statistics do not have them or the shard is not there."""
    path = Path(url).with_name(f"{Path(url).stem}{_STATISTICS}")
    content = _read_json(path)
    count: Any = content.get("successes") if isinstance(content, dict) else None
    if not _is_count(count):
        logger.warning("index: %s is ignored: it has no number of successes", path)
        return {}
    return {url: count} if Path(url).is_file() else {}


def _read_json(path: Path) -> Any:
    """Return what a file holds, None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("index: %s is ignored: it cannot be read as json (%s)", path, error)
        return None
