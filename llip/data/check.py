"""Before training: whether the shards are there, suffice for the workers, and how the schedule compares with them."""

import contextlib
import logging
import os
import tarfile
from pathlib import Path

from llip.configs import Config
from llip.data.index import load_index
from llip.data.sources import IMAGE_KEYS, DataSpec, ShardSource, check_shards_exist, is_local
from llip.errors import UserError

_COUNTED_BYTES = 2 << 30  # local shards up to this size are counted before the start

log = logging.getLogger("llip")


def check_data(config: Config, data: DataSpec) -> None:
    """Compare the config with what its shards hold, as far as that is known or quickly counted.

    Raises:
        UserError: missing or empty shards, fewer samples than one global batch, or more workers than samples.
    """
    check_shards_exist(data)
    if config.steps_per_epoch < 1:
        raise UserError(
            f"train_num_samples = {config.train_num_samples:,} is less than one global batch of "
            f"{config.global_batch:,} pairs; set it to the number of pairs in train_data, or reduce batch_size"
        )
    counts = _known_counts(data)
    for source in data.sources:
        _check_workers(config, source, counts)
    if all(url in counts for url in data.urls):
        _compare_schedule(config, sum(counts[url] for url in data.urls))


def _known_counts(data: DataSpec) -> dict[str, int]:
    """Return the samples by URL, as far as an index has them or counting is quick."""
    counts = load_index(data.urls)
    unknown = [url for url in data.urls if url not in counts]
    log.info("data: %d shards in %d datasets", len(data.urls), len(data.sources))
    quick = all(is_local(url) and Path(url).is_file() for url in unknown)
    if quick and sum(os.path.getsize(url) for url in unknown) <= _COUNTED_BYTES:
        counts |= {url: _count_samples(url) for url in unknown}
    elif unknown:
        log.info("data: %d shards are not counted; run `llip doctor PATTERN --index` to count them", len(unknown))
    return counts


def _check_workers(config: Config, source: ShardSource, counts: dict[str, int]) -> None:
    """Refuse more data workers than samples: some would have nothing to read."""
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


def _count_samples(url: str) -> int:
    """Count the images of a local shard by its headers, up to the first damage."""
    count = 0
    with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(url) as tar:
        for member in tar:
            count += member.name.rsplit(".", 1)[-1].lower() in IMAGE_KEYS
    return count
