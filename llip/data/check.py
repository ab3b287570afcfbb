"""Checks before training: the shards exist and suffice for the workers; how often the schedule visits them."""

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llip.configs import Config
from llip.data.index import ShardEntry, describe_shard, load_index, write_index
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.sources import DataSpec, ShardSource, check_shards_exist, is_local
from llip.data.tar_reader import Damage, read_samples
from llip.errors import UserError

_COUNT_SECONDS = 20.0  # longest that local shards are counted before the start
_WORTH_AN_INDEX = 2.0  # seconds of counting after which the counts are written beside the shards

log = logging.getLogger("llip")


def check_schedule(config: Config) -> None:
    """Raise a `UserError` where an epoch has no step."""
    if config.steps_per_epoch < 1:
        raise UserError(
            f"train_num_samples = {config.train_num_samples:,} is less than one global batch of "
            f"{config.global_batch:,} pairs; set it to the number of pairs in train_data, or reduce batch_size"
        )


def check_data(config: Config, data: DataSpec) -> None:
    """Compare a config with what its shards hold, as far as that is known or quickly counted.

    Raises:
        UserError: missing or empty shards, fewer samples than one global batch, or more workers than samples.
    """
    if data.features is None:  # the shards of a cache have been checked
        check_shards_exist(data)
    check_schedule(config)
    log.info("data: %d shards in %d datasets", len(data.urls), len(data.sources))
    counts = count_samples(data)
    for source in data.sources:
        _check_workers(config, source, counts)
    if all(url in counts for url in data.urls):
        _compare_schedule(config, sum(counts[url] for url in data.urls))


def count_samples(data: DataSpec) -> dict[str, int]:
    """Return the samples by URL, as far as an index has them or counting is quick."""
    counts = load_index(data.urls)
    began = time.monotonic()
    entries = _count([url for url in data.urls if url not in counts and is_local(url) and Path(url).is_file()])
    if time.monotonic() - began > _WORTH_AN_INDEX:
        _keep({url: entry for url, entry in entries.items() if not entry.damaged})
    counts |= {url: entry.samples for url, entry in entries.items()}
    if missing := len(set(data.urls) - counts.keys()):
        log.info("data: %d shards are not counted; run `llip doctor PATTERN --index` to count them", missing)
    return counts


def _count(urls: list[str]) -> dict[str, ShardEntry]:
    """Count the samples of local shards by their headers, up to the first damage, until the time is up.

    Raises:
        UserError: a file hangs.
    """
    entries: dict[str, ShardEntry] = {}
    watch = ReadWatch()
    end = time.monotonic() + _COUNT_SECONDS
    with (
        tqdm(total=len(urls), desc="count samples", unit=" shards", delay=1, leave=False, disable=None) as bar,
        contextlib.closing(read_ahead(_entries(urls, watch), watch)) as counted,
    ):
        for url, entry in counted:
            if entry is not None:
                entries[url] = entry
                bar.update()
            if time.monotonic() > end:
                break
    return entries


def _entries(urls: list[str], watch: ReadWatch) -> Iterator[tuple[str, ShardEntry | None]]:
    """Yield (shard, None) at each of its samples, so that the reader of a large one can leave, and then its entry."""
    for url in urls:
        entry = describe_shard(url, 0, 0)  # before reading: a later change makes the entry stale
        kinds = Counter[type]()
        for item in read_samples(url, watch=watch, headers_only=True):
            kinds[type(item)] += 1
            yield url, None
        yield url, dataclasses.replace(entry, samples=kinds[dict], damaged=kinds[Damage])


def _keep(entries: dict[str, ShardEntry]) -> None:
    try:
        for path in write_index(entries):
            log.info("data: the counts of %d shards are in %s", len(entries), path)
    except UserError as error:
        log.info("data: the shards will be counted again at the next start: %s", error)


def _check_workers(config: Config, source: ShardSource, counts: dict[str, int]) -> None:
    """Raise a `UserError` if there are more data workers than samples: some would have nothing to read."""
    workers = config.processes * max(1, config.workers)
    if len(source.urls) >= workers or any(url not in counts for url in source.urls):
        return
    largest = max(counts[url] for url in source.urls)
    if 0 < largest < workers:
        fix = (
            f"workers={largest // config.processes}" if largest >= config.processes else f"at most {largest} processes"
        )
        raise UserError(
            f"train_data {source.pattern!r}: {len(source.urls)} shards of at most {largest} samples cannot be shared "
            f"by {config.processes} processes x {max(1, config.workers)} workers; use {fix}"
        )


def _compare_schedule(config: Config, samples: int) -> None:
    seen = config.total_steps * config.global_batch
    epochs = seen / max(1, samples)
    log.info("data: %s samples; schedule: %s pairs (%.2f epochs of the data)", f"{samples:,}", f"{seen:,}", epochs)
    if samples and config.train_num_samples > samples:
        log.warning(
            "data: train_num_samples = %s, but the shards hold %s samples: each epoch repeats the data %.2f times",
            f"{config.train_num_samples:,}",
            f"{samples:,}",
            config.train_num_samples / samples,
        )
