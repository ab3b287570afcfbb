"""Scan one shard: contents and damage, in counts that stay small however large the shard is."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from open_clip import SimpleTokenizer
from PIL import Image

from llip.data.captions import BadSample, CaptionSource, parse_caption_keys
from llip.data.features.format import DAMAGED, ERROR, IMAGE, read_array
from llip.data.images import EMPTY, MAX_PIXELS, NO_IMAGE, NOT_AN_IMAGE, TOO_LARGE, decode_image
from llip.data.index import ShardEntry, describe_shard
from llip.data.prefetch import READ_DEADLINE, ReadWatch, read_ahead
from llip.data.shard_file import COMMAND_FAILED, DOWNLOAD_FAILED, MISSING, STALLED, UNREADABLE
from llip.data.sources import IMAGE_KEYS
from llip.data.tar_reader import Damage, read_samples
from llip.errors import UserError

NO_CAPTION = "no caption"
NO_SAMPLES = "shard holds no samples"

_CAPTION_FIELD = re.compile(r"caption|^(alt|alt_text|description|prompt|texts?|title)$", re.IGNORECASE)
_PASSING = {COMMAND_FAILED, DOWNLOAD_FAILED, MISSING, STALLED, UNREADABLE}  # a later scan may find more samples
_FIELDS_LISTED = 100  # json fields of one shard: some files use data as names
_CACHED_WORDS = 200_000  # of the tokenizer, whose cache has no limit
_CHARACTERS = 10_000  # of a caption that are tokenised
_REPORT_EVERY = 0.5  # seconds

Outcome = tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]
"""Of one sample: why its image is unusable (or ''), its usable caption sources, and the others with the reason."""


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """How shards are scanned."""

    caption_keys: str | None  # None: every source that looks like captions
    full_images: bool  # decode every image, or read its header only
    context_length: int  # tokens
    deadline: float = READ_DEADLINE  # seconds without a byte


@dataclasses.dataclass
class CaptionFindings:
    """Counts of one caption source."""

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    per_image: Counter[int] = dataclasses.field(default_factory=Counter)  # captions
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)  # of a caption, with start and end

    def add(self, other: "CaptionFindings") -> None:
        self.kinds += other.kinds
        self.per_image += other.per_image
        self.tokens += other.tokens


@dataclasses.dataclass
class ShardFindings:
    """Counts of one shard. `keys`: 64-bit digests of its samples' keys, sorted."""

    url: str
    entry: ShardEntry | None = None  # without counts; None: it could not be read to its end this time
    samples: int = 0
    outcomes: Counter[Outcome] = dataclasses.field(default_factory=Counter)
    damage: Counter[str] = dataclasses.field(default_factory=Counter)  # apart from unusable samples
    details: dict[str, str] = dataclasses.field(default_factory=dict)  # reason -> the first case
    suffixes: Counter[str] = dataclasses.field(default_factory=Counter)
    fields: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # (json field, type)
    captions: dict[str, CaptionFindings] = dataclasses.field(default_factory=dict)
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    modes: Counter[str] = dataclasses.field(default_factory=Counter)
    widths: Counter[int] = dataclasses.field(default_factory=Counter)
    heights: Counter[int] = dataclasses.field(default_factory=Counter)
    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def cases(self) -> int:
        """Damage that does not depend on the choice of captions."""
        return self.damage.total() + sum(count for (image, _, _), count in self.outcomes.items() if image)

    def count_damage(self, reason: str, detail: str = "") -> None:
        """Count one case of damage that is not a sample."""
        self.damage[reason] += 1
        self.details.setdefault(reason, detail)


class ShardScanner:
    """Scans shards; holds a tokenizer."""

    def __init__(self, settings: ScanSettings) -> None:
        self.settings = settings
        self.sources = parse_caption_keys(settings.caption_keys) if settings.caption_keys else None
        self.tokenizer = SimpleTokenizer(context_length=settings.context_length)
        self._known_words = dict(self.tokenizer.cache)

    def scan(self, url: str, progress: Callable[[int], None]) -> ShardFindings:
        """Return the findings; `progress` is called now and then with the number of samples so far."""
        shard = ShardFindings(url)
        watch, digests, reported = ReadWatch(), [], time.monotonic()
        with contextlib.suppress(OSError):  # reading reports it
            shard.entry = describe_shard(url, 0, 0)  # before reading: a later change makes the entry stale
        try:
            for item in read_ahead(read_samples(url, watch=watch), watch, self.settings.deadline):
                if isinstance(item, Damage):
                    shard.count_damage(item.reason, item.detail)
                    continue
                digests.append(hashlib.blake2b(item["__key__"].encode("utf-8", "replace"), digest_size=8).digest())
                self._scan_sample(item, shard)
                if time.monotonic() - reported > _REPORT_EVERY:
                    progress(shard.samples)
                    reported = time.monotonic()
        except UserError as error:
            shard.count_damage(STALLED, str(error))
        if shard.damage.keys() & _PASSING:
            shard.entry = None
        if shard.samples == 0 and not shard.damage:
            shard.count_damage(NO_SAMPLES)
        shard.keys = np.sort(np.frombuffer(b"".join(digests), np.uint64))
        return shard

    def _scan_sample(self, sample: Mapping[str, Any], shard: ShardFindings) -> None:
        shard.samples += 1
        shard.suffixes.update(suffix for suffix in sample if not suffix.startswith("__"))
        record, unreadable = _record(sample)
        for field, value in record.items():
            typed = (field, _kind(value))
            if typed in shard.fields or len(shard.fields) < _FIELDS_LISTED:
                shard.fields[typed] += 1
        image = self._scan_image(sample, shard)
        good: list[str] = []
        bad = [] if self.sources or not unreadable else [("json", unreadable)]
        for source in self.sources or _likely_sources(sample, record):
            name = source_name(source)
            try:
                captions = source.captions(sample)
            except BadSample as error:
                bad.append((name, error.reason))
                continue
            if captions:
                good.append(name)
                kind = "text" if source.field is None else _kind(record[source.field])
                self._scan_captions(captions, kind, shard.captions.setdefault(name, CaptionFindings()))
        shard.outcomes[image, tuple(good), tuple(bad)] += 1

    def _scan_captions(self, captions: list[str], kind: str, counts: CaptionFindings) -> None:
        counts.kinds[kind] += 1
        counts.per_image[len(captions)] += 1
        for caption in captions:
            counts.tokens[len(self.tokenizer.encode(caption[:_CHARACTERS])) + 2] += 1
        if len(self.tokenizer.cache) > _CACHED_WORDS:
            self.tokenizer.cache = dict(self._known_words)

    def _scan_image(self, sample: Mapping[str, Any], shard: ShardFindings) -> str:
        key = next((key for key in IMAGE_KEYS if key in sample), None)
        if key is None:
            return _scan_features(sample, shard)
        reason = "" if sample[key] else EMPTY
        try:
            with Image.open(io.BytesIO(sample[key])) as image:  # the header only
                shard.formats[image.format or "?"] += 1
                shard.modes[image.mode] += 1
                shard.widths[image.width] += 1
                shard.heights[image.height] += 1
                if image.width * image.height > MAX_PIXELS:
                    reason = TOO_LARGE
        except Image.DecompressionBombError:
            reason = TOO_LARGE
        except Exception:  # PIL raises many kinds for damaged bytes
            reason = reason or NOT_AN_IMAGE
        if self.settings.full_images:
            try:
                decode_image(sample[key])
            except BadSample as error:
                return error.reason
            return ""
        return reason


def _scan_features(sample: Mapping[str, Any], shard: ShardFindings) -> str:
    """Return why a sample of a feature cache cannot be used; of another sample, that it has no image."""
    if ERROR in sample:
        return sample[ERROR].decode(errors="replace")
    if f"{IMAGE}.npy" not in sample:
        return NO_IMAGE
    try:
        features = read_array(sample[f"{IMAGE}.npy"])
    except ValueError:
        return DAMAGED
    shard.formats[f"features {features.dtype} {' x '.join(map(str, features.shape))}"] += 1
    return ""


def source_name(source: CaptionSource) -> str:
    """Return a caption source as it is written in `caption_keys`."""
    return source.member if source.field is None else f"{source.member}.{source.field}"


def _likely_sources(sample: Mapping[str, Any], record: Mapping[str, Any]) -> list[CaptionSource]:
    fields = [field for field in record if _CAPTION_FIELD.search(field) and re.fullmatch(r"[^:,]+", field)]
    return [CaptionSource("txt", None, 1.0)] * ("txt" in sample) + [CaptionSource("json", f, 1.0) for f in fields]


def _record(sample: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the object in the `json` member, or why there is none."""
    try:
        record = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}, "json is not json"
    return (record, "") if isinstance(record, dict) else ({}, "json is not an object")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "list of strings" if value and all(isinstance(item, str) for item in value) else "list"
    names = {str: "string", bool: "true/false", int: "number", float: "number", dict: "object", type(None): "null"}
    return names[type(value)]
