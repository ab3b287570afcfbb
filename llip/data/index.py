"""How many samples each shard holds, so that a loader need not read to know: `llip-index.json`.

The file lies beside the shards and names them by file name, or in a chosen folder and names them by absolute path or
URL, so that one folder can serve many datasets. `llip doctor PATTERN --index` writes it.

    {"version": 1, "shards": {"00000.tar": {"samples": 998, "damaged": 2, "bytes": 41943040, "mtime_ns": 17...}}}

`samples` counts what `samples.read_samples` yields, usable or not; `damaged` is how many of them cannot be used, plus
damage outside samples. A local shard's entry holds while its size and time of change are those of the file; a remote
one is known by its URL alone. img2dataset's `00000_stats.json` serves as a count where there is no index; it is what
the download wrote down and is not checked against the shard.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from llip.data.sources import is_local
from llip.errors import UserError
from llip.system.files import write_text

INDEX_NAME = "llip-index.json"
_VERSION = 1
_STATS_SUFFIX = "_stats.json"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """What the index knows of one shard; `bytes` and `mtime_ns` are those of its file, None for a remote one."""

    samples: int
    damaged: int = 0
    bytes: int | None = None
    mtime_ns: int | None = None


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """Samples by URL, for those shards whose count is known; and the URLs whose entry is older than the shard."""

    samples: dict[str, int]
    stale: tuple[str, ...]


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


def read_counts(urls: Iterable[str], folder: str | Path | None = None) -> ShardCounts:
    """Look up the samples of `urls`: in the index in `folder`, beside the shards, then in img2dataset's statistics.

    A file that cannot be understood counts as none, with a warning that names it.
    """
    indexes: dict[Path, dict[str, ShardEntry]] = {}
    listings: dict[Path, frozenset[str]] = {}
    samples: dict[str, int] = {}
    stale = []
    for url in urls:
        found = []
        for chosen in (folder, None) if folder is not None else (None,):
            if chosen is None and not is_local(url):
                continue
            path, name = _place(url, chosen)
            if path not in indexes:
                indexes[path] = _read(path)
            if name in indexes[path]:
                found.append(indexes[path][name])
        valid = next((entry for entry in found if _holds(url, entry)), None)
        if valid is not None:
            samples[url] = valid.samples
        elif found:
            stale.append(url)
        elif is_local(url) and (count := _img2dataset_count(Path(url), listings)) is not None:
            samples[url] = count
    return ShardCounts(samples, tuple(stale))


def load_index(urls: Iterable[str], folder: str | Path | None = None) -> dict[str, int]:
    """Return the samples by URL for those of `urls` whose count is known and holds; warn about how many are stale."""
    counts = read_counts(urls, folder)
    if counts.stale:
        logger.warning(
            "index: %d shards have changed since they were indexed, the first is %s; "
            "llip doctor PATTERN --index counts them again",
            len(counts.stale),
            counts.stale[0],
        )
    return counts.samples


def _place(url: str, folder: str | Path | None) -> tuple[Path, str]:
    """Return the index file that a shard belongs into, and its name there."""
    if folder is None:
        return Path(url).parent / INDEX_NAME, Path(url).name
    return Path(folder) / INDEX_NAME, os.path.abspath(url) if is_local(url) else url


def _holds(url: str, entry: ShardEntry) -> bool:
    if not is_local(url):
        return True
    try:
        status = os.stat(url)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (entry.bytes, entry.mtime_ns)


def _read(path: Path) -> dict[str, ShardEntry]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("index: %s is left aside, it cannot be read as json (%s)", path, error)
        return {}
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or content.get("version") != _VERSION:
        logger.warning("index: %s is left aside, it is not an index of version %d", path, _VERSION)
        return {}
    entries = {name: entry for name, values in shards.items() if (entry := _entry(values)) is not None}
    if len(entries) < len(shards):
        logger.warning("index: %s has %d entries of another form, left aside", path, len(shards) - len(entries))
    return entries


def _entry(values: object) -> ShardEntry | None:
    names = {field.name for field in dataclasses.fields(ShardEntry)}
    if not isinstance(values, dict) or not names.issuperset(values) or not _is_count(values.get("samples")):
        return None
    if any(value is not None and not _is_count(value) for value in values.values()):
        return None
    return ShardEntry(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _img2dataset_count(shard: Path, listings: dict[Path, frozenset[str]]) -> int | None:
    if shard.parent not in listings:
        try:
            names = os.listdir(shard.parent)
        except OSError:
            names = []
        listings[shard.parent] = frozenset(name for name in names if name.endswith(_STATS_SUFFIX))
    name = f"{shard.stem}{_STATS_SUFFIX}"
    if name not in listings[shard.parent] or not shard.is_file():
        return None
    path = shard.with_name(name)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("index: %s is left aside, it cannot be read as json (%s)", path, error)
        return None
    count = content.get("successes") if isinstance(content, dict) else None
    if not _is_count(count):
        logger.warning("index: %s is left aside, it has no number of successes", path)
        return None
    return count
