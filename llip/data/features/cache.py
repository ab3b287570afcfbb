"""A folder of frozen features: which shards it holds, and whether they are those of a run.

    manifest.json   what the features were made with: weights, transforms, captions, and their format
    shards.jsonl    one line for each finished shard, with size and time of its source
    00000.tar       as the shard of that name in the source: the same samples, in the same order (`format`)

The second of two source shards with one name lies in the folder `1`, and so on. `llip encode` writes all of it, and
`feature_cache=DIR` reads it: each shard instead of its source, so that the order of samples, their names and what is
drawn for them are those of the run without a cache.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llip.configs import Config
from llip.data.captions import parse_caption_keys
from llip.data.features.format import FeatureFormat
from llip.data.sources import DataSpec, is_local, shard_name
from llip.errors import UserError
from llip.system.files import write_json

MANIFEST, SHARDS = "manifest.json", "shards.jsonl"
_VERSION = 1
_BLOCK, _BLOCKS = 1 << 16, 16  # of a source shard that are compared where its time has changed


@dataclasses.dataclass(frozen=True)
class CachedShard:
    """A finished shard of a cache, and the source shard as it was when it was read (None: not on that machine)."""

    file: str  # below the cache's folder
    samples: int
    unusable: dict[str, int]  # reason -> samples
    bytes: int
    source_bytes: int | None = None
    source_mtime_ns: int | None = None
    source_digest: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache was made with."""

    format: FeatureFormat
    made_with: dict[str, Any]


def cached_parts(config: Config) -> tuple[bool, bool]:
    """Return whether features of images, and of captions, can stand for them under the config's locks."""
    image = config.lock_image is True or config.lock_image == "backbone"  # not 1, which is all but a block
    return image, config.lock_text in (True, "encoder")


def check_cacheable(config: Config) -> None:
    """Raise a `UserError` for settings under which an image or a caption is not the same at each visit."""
    images, texts = cached_parts(config)
    if not images:
        raise UserError(
            f"frozen features need a frozen image tower, but lock_image = {config.lock_image!r}; set "
            "lock_image=backbone (a model with a mixture_head), or lock_image=true"
        )
    refused: dict[str, tuple[Any, str]] = {
        "image_crop": ("center", "crops differ at each visit"),
        "image_transform": (None, "it changes images"),
    }
    if texts:
        refused["caption_transform"] = (None, "it changes captions, whose features are frozen (lock_text)")
        refused["caption_sentences"] = (0, "it merges captions, whose features are frozen (lock_text)")
    for field, (value, reason) in refused.items():
        if getattr(config, field) != value:
            raise UserError(
                f"frozen features: {field} = {getattr(config, field)!r} cannot be cached: {reason}; set "
                f"{field}={str(value).lower()}"
            )


def caption_sources(config: Config) -> list[str]:
    """Return the sources that `caption_keys` names, without weights."""
    return sorted(
        source.member if source.field is None else f"{source.member}.{source.field}"
        for source in parse_caption_keys(config.caption_keys)
    )


def cached_files(data: DataSpec) -> list[str]:
    """Return, for each source shard, its file below a cache's folder."""
    seen = Counter[str]()
    files: list[str] = []
    for url in data.urls:
        name = shard_name(url)
        files.append(f"{seen[name]}/{name}" if seen[name] else name)
        seen[name] += 1
    return files


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a cache, None where there is none.

    Raises:
        UserError: it cannot be read, or is of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            raise UserError(f"feature cache {str(folder)!r} has version {content['version']!r}, expected {_VERSION}")
        form = content["format"]
        return Manifest(FeatureFormat(form["dtype"], tuple(form["image"]), form["text"]), dict(content["made_with"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"feature cache: {path} cannot be read ({type(error).__name__}: {error}); remove the folder and run "
            "`llip encode` again"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically.

    Raises:
        OSError: the disk cannot take it.
    """
    write_json(folder / MANIFEST, {"version": _VERSION, **dataclasses.asdict(manifest)})


def read_shards(folder: Path) -> dict[str, CachedShard]:
    """Return the finished shards by file; a line that a kill has cut is ignored."""
    shards = {}
    try:
        lines = (folder / SHARDS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"feature cache: {folder / SHARDS} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            shard = CachedShard(**json.loads(line))
        except (ValueError, TypeError):
            continue
        shards[shard.file] = shard
    return shards


def add_shard(folder: Path, shard: CachedShard) -> None:
    """Record a finished shard.

    Raises:
        OSError: the disk cannot take it.
    """
    with open(folder / SHARDS, "a") as file:
        file.write("\n" * _ends_in_a_line(folder / SHARDS) + json.dumps(dataclasses.asdict(shard)) + "\n")


def _ends_in_a_line(path: Path) -> bool:
    """Return whether a kill has left the last line without its end."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def describe_source(url: str) -> dict[str, Any]:
    """Return the fields of a `CachedShard` that tell whether its source has changed; none for a remote one.

    Raises:
        OSError: it cannot be read.
    """
    if not is_local(url):
        return {}
    status = os.stat(url)
    digest = _digest(url, status.st_size)
    return {"source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns, "source_digest": digest}


def _digest(path: str, size: int) -> str:
    """Return a digest of evenly spaced parts of a file: of all of it up to 1 MiB."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for number in range(_BLOCKS):
            file.seek(number * max(_BLOCK, size // _BLOCKS))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def source_change(url: str, shard: CachedShard) -> str | None:
    """Return how a source shard differs from what was read, None where it does not or is not on this machine.

    A file with another time, such as a copy, is the same if its size and parts of its bytes are.
    """
    if not is_local(url) or shard.source_bytes is None or not os.path.isfile(url):
        return None
    status = os.stat(url)
    if status.st_size != shard.source_bytes:
        return f"{shard.source_bytes:,} bytes then, {status.st_size:,} now"
    if status.st_mtime_ns != shard.source_mtime_ns and _digest(url, status.st_size) != shard.source_digest:
        return "other bytes than then"
    return None


def is_finished(folder: Path, shard: CachedShard | None) -> bool:
    """Return whether a recorded shard is there with its size."""
    path = folder / shard.file if shard else folder
    return shard is not None and path.is_file() and path.stat().st_size == shard.bytes


def compare(then: Mapping[str, Any], now: Mapping[str, Any], what: str, fix: str) -> None:
    """Raise a `UserError` for the first thing that features were made with and that is another now.

    Args:
        then: what the manifest holds.
        now: by the same names, all that counts.
        what: the beginning of the message.
        fix: what to do, beside using the old value.
    """
    for name, value in now.items():
        before = then.get(name)
        if name == "captions" and set(value) <= set(before or ()):
            continue  # features of further captions do no harm
        if before != value:
            raise UserError(f"{what} {name}: {before!r} then, {value!r} now; use the old value, or {fix}")


def open_cache(folder: Path) -> Manifest:
    """Return the manifest of a cache that a run reads.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        what = "has no manifest.json" if folder.is_dir() else "is not there"
        raise UserError(f"feature_cache = {str(folder)!r} {what}; write it with: llip encode CONFIG --out {folder}")
    return manifest


def cached_data(config: Config, data: DataSpec) -> DataSpec:
    """Return what the run reads instead of `data`: the shards of its `feature_cache`.

    Raises:
        UserError: the settings do not go with a cache; or it is missing, incomplete or damaged, or was made from other
            shards.
    """
    assert config.feature_cache is not None
    check_cacheable(config)
    folder = Path(config.feature_cache)
    manifest, shards = open_cache(folder), read_shards(folder)
    files = cached_files(data)
    resume = f"run `llip encode` with --out {folder} again, which keeps what is finished"
    if missing := [file for file in files if file not in shards]:
        raise UserError(
            f"feature cache {str(folder)!r} lacks {len(missing)} of the {len(files)} shards of train_data, the first "
            f"is {missing[0]!r}; {resume}"
        )
    for file, url in zip(files, data.urls, strict=True):
        if not is_finished(folder, shards[file]):
            size = os.path.getsize(folder / file) if (folder / file).is_file() else 0
            raise UserError(
                f"feature cache: {folder / file} has {size:,} bytes, {shards[file].bytes:,} when it was written; "
                f"{resume}"
            )
        if change := source_change(url, shards[file]):
            raise UserError(f"feature cache {str(folder)!r}: source shard {url!r} has changed: {change}; {resume}")
    places = iter(str(folder / file) for file in files)
    sources = tuple(
        dataclasses.replace(source, urls=tuple(next(places) for _ in source.urls)) for source in data.sources
    )
    form = manifest.format
    return DataSpec(sources, form if uses_text_features(config, form) else dataclasses.replace(form, text=None))


def uses_text_features(config: Config, form: FeatureFormat) -> bool:
    """Return whether a run reads the features of captions: where they are cached, and its text encoder is locked."""
    return form.text is not None and cached_parts(config)[1]
