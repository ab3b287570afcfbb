"""From the `train_data` string to its datasets and their shards. Nothing here opens a shard."""

import dataclasses
import functools
import glob
import math
import os
import re
import stat
from pathlib import Path

from webdataset.shardlists import expand_urls

from llip.data.features.format import FeatureFormat
from llip.errors import UserError, shown
from llip.system.paths import expand_variables

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
SCENES_SCHEME = "scenes:"
_REMOTE = re.compile(r"^(pipe|https?|hf|gs|file|hdfs|ais|s3):")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)")
_MOST_SHARDS = 10_000_000
_WEIGHT = re.compile(r"@(\d*\.?\d+(?:[eE][-+]?\d+)?)$")


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """One dataset: its shards, ordered by name, and its sampling weight."""

    pattern: str
    urls: tuple[str, ...]
    weight: float


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What `train_data` names, resolved once at the start of a run."""

    sources: tuple[ShardSource, ...]
    features: FeatureFormat | None = None  # the shards are those of a feature cache

    @functools.cached_property
    def urls(self) -> tuple[str, ...]:
        """The shards of all datasets."""
        return tuple(url for source in self.sources for url in source.urls)

    @property
    def shard_counts(self) -> list[int]:
        """The number of shards of each dataset."""
        return [len(source.urls) for source in self.sources]


def is_local(url: str) -> bool:
    """Return whether `url` is a path on this machine."""
    return _REMOTE.match(url) is None


def parse_train_data(train_data: str) -> DataSpec:
    """Resolve `train_data` into its datasets.

    Args:
        train_data: a brace pattern, a glob, a comma list, `scenes:DIR`, a `pipe:` command, an http(s) URL; several
            datasets joined by `::`, each with an optional weight `@0.7` (default 1).

    Raises:
        UserError: `train_data` is empty, has unbalanced braces or too many shards, a pattern matches no file, a weight
            is infinite, or all are 0.
    """
    if not train_data:
        raise UserError("train_data is empty; set it to shards, for instance train_data='/data/{00000..00099}.tar'")
    sources = []
    for pattern in train_data.split("::"):
        weight = _WEIGHT.search(pattern)
        if weight:
            pattern = pattern[: weight.start()]
        urls = [url for part in _split_patterns(pattern) for url in _expand(part)]
        if not urls:
            raise UserError(f"train_data {pattern!r} matches no file (searched from {Path.cwd()})")
        # By name, so that the order of samples does not depend on folders; equal names keep the order given.
        sources.append(ShardSource(pattern, tuple(sorted(urls, key=shard_name)), float(weight[1]) if weight else 1.0))
    if not 0 < sum(source.weight for source in sources) < math.inf:
        raise UserError(f"train_data {train_data!r}: expected weights that are finite and not all 0")
    return DataSpec(tuple(source for source in sources if source.weight > 0))


def _split_patterns(text: str) -> list[str]:
    """Split a comma list, except commas inside braces and pipe: commands."""
    if text.startswith("pipe:"):
        return [text]
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


def _expand(pattern: str) -> list[str]:
    if pattern.startswith(SCENES_SCHEME):
        pattern = str(Path(expand_variables(pattern.removeprefix(SCENES_SCHEME))) / "train-*.tar")
    if pattern.startswith("s3:"):
        raise UserError(
            f"train_data {pattern!r}: s3 needs its own command; use 'pipe:aws s3 cp {pattern} -' "
            "(braces are expanded there too)"
        )
    if not is_local(pattern):
        return _expand_braces(pattern)
    urls = _expand_braces(expand_variables(pattern))
    return [path for url in urls for path in (sorted(glob.glob(url)) if glob.has_magic(url) else [url])]


def _expand_braces(pattern: str) -> list[str]:
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if count > _MOST_SHARDS:
        raise UserError(f"train_data {pattern!r} names {count:,} shards; expected at most {_MOST_SHARDS:,}")
    try:
        return expand_urls(pattern)
    except ValueError as error:
        raise UserError(
            f"train_data {pattern!r}: unbalanced braces; expected a form like '{{00000..00099}}.tar'"
        ) from error


def check_shards_exist(data: DataSpec) -> None:
    """Raise a `UserError` that names the local shards that are missing, empty, or of a kind that is not read."""
    files = {url: _stat(url) for url in data.urls if is_local(url)}
    missing = [url for url, file in files.items() if file is None]
    if missing:
        raise UserError(
            f"train_data: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]!r} "
            f"(searched from {Path.cwd()})"
        )
    folder = next((url for url, file in files.items() if file and stat.S_ISDIR(file.st_mode)), None)
    if folder:
        pattern = folder.rstrip("/") + "/*.tar"
        raise UserError(f"train_data: {folder!r} is a folder; expected shards, for instance {pattern!r}")
    packed = next((url for url in files if url.endswith((".zst", ".zstd"))), None)
    if packed:
        raise UserError(f"train_data: {packed!r} is compressed with zstd; use 'pipe:zstd -dc {packed}' (braces expand)")
    empty = [url for url, file in files.items() if file and stat.S_ISREG(file.st_mode) and file.st_size == 0]
    if empty:
        raise UserError(f"train_data: {len(empty)} of {len(files)} shards are empty files, the first is {empty[0]!r}")


def _stat(url: str) -> os.stat_result | None:
    """Return what the file system knows of a local shard, None where it is not there."""
    try:
        return os.stat(url)  # once for each shard: on a network file system that is most of the start
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"train_data: {shown(url)} cannot be read: {getattr(error, 'strerror', error)}") from error


def shard_name(url: str) -> str:
    """Return a shard's name wherever it is stored: the file name, for a command the last word with a slash."""
    return url.rstrip("/").rsplit("/", 1)[-1]
