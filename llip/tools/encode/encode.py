"""From a run's shards to a folder of their frozen features, shard by shard.

Shapes: B images of a batch, S image size, L features of an image, W their width, T captions of a batch.
"""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llip.configs import Config
from llip.data.captions import BadSample, distinct_captions
from llip.data.check import count_samples
from llip.data.features.cache import (
    Manifest,
    add_shard,
    cached_files,
    cached_parts,
    check_cacheable,
    compare,
    is_finished,
    read_manifest,
    read_shards,
    source_change,
    write_manifest,
)
from llip.data.features.format import FeatureDtype, tar_bytes
from llip.data.features.made_with import check_frozen, describe, feature_format
from llip.data.index import describe_shard, write_index
from llip.data.sources import DataSpec, check_shards_exist
from llip.data.tar_reader import Damage, read_samples
from llip.data.worker_stats import WorkerStats
from llip.errors import RunError, UserError
from llip.open_clip.factory import model_spec, spec_tokenizer
from llip.system.locks import held_lock
from llip.system.processes import Processes
from llip.tools.encode.shard import Encoder, UnreadableShard
from llip.training.distributed.launch import resolve_device
from llip.training.setup import find_data, start_model, starting_point

LOCK = ".lock"
_LOCK_PATIENCE = 3.0  # seconds
_MEASURED = 64  # samples from which the number of captions and their length are predicted


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a cache holds; `dataclasses.asdict` of it is the json document."""

    out: str
    format: dict[str, Any]
    shards: int
    samples: int
    usable: int  # samples with features
    dropped: dict[str, int]  # reason -> samples
    unread: dict[str, str]  # source shard -> why it could not be read this time
    new: int  # samples that were encoded now
    bytes: int
    predicted_bytes: int
    seconds: float


def encode(config: Config, out: Path, dtype: FeatureDtype) -> Encoded:
    """Write the frozen features of a run's data to `out`; shards that are finished and unchanged are kept.

    Args:
        config: of the run; its locks say what is encoded.
        out: folder of the cache.
        dtype: of the features.

    Raises:
        UserError: the settings do not go with a cache; `out` holds something else, or too little room; or the data are
            not there, change, or are unusable.
        RunError: the disk has run full.
    """
    config = config.replace(feature_cache=None, nodes=1, ngpus=1)
    check_cacheable(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; expected a folder")
    device, spec = torch.device(resolve_device(config)), model_spec(config)
    data, tokenizer = find_data(config), spec_tokenizer(spec)
    check_shards_exist(data)
    model = start_model(config, spec, starting_point(config, Processes()), device)
    texts = cached_parts(config)[1]
    check_frozen(model, texts)
    form = feature_format(spec, model, dtype, texts)
    manifest = Manifest(form, describe(config, spec, model, tokenizer, texts))
    stats = WorkerStats(config.max_bad_fraction, 1, "an image and a caption of caption_keys")
    encoder = Encoder(config, spec, model, tokenizer, form, stats)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written: {error.strerror}; choose another folder") from error
    try:
        with held_lock(out / LOCK, f"feature cache {str(out)!r}", "choose another --out", _LOCK_PATIENCE):
            claim(out, manifest)
            return _encode_shards(encoder, data, out)
    except OSError as error:
        raise RunError(
            f"feature cache {str(out)!r} cannot be written: {error}; make room or fix the folder, and run the same "
            "command again, which keeps what is finished"
        ) from error


def claim(out: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder, whose lock is held, and remove what a killed encoder has left half.

    Raises:
        UserError: the folder holds other features, or anything else.
    """
    for path in out.rglob("*.tmp"):
        path.unlink()
    before = read_manifest(out)
    if before is None:
        if others := sorted(path.name for path in out.iterdir() if path.name != LOCK):
            raise UserError(f"--out {str(out)!r} holds {others[0]!r} and is no feature cache; choose an empty folder")
        write_manifest(out, manifest)
        return
    then, now = (vars(each.format) | each.made_with for each in (before, manifest))
    compare(then, now, f"--out {str(out)!r} holds features made with another", "choose another --out")


def _encode_shards(encoder: Encoder, data: DataSpec, out: Path) -> Encoded:
    began, form = time.monotonic(), encoder.form
    pairs = dict(zip(cached_files(data), data.urls, strict=True))
    recorded = read_shards(out)
    done = {
        file: recorded[file]
        for file, url in pairs.items()
        if is_finished(out, recorded.get(file)) and source_change(url, recorded[file]) is None
    }
    rest = {file: url for file, url in pairs.items() if file not in done}
    counts = count_samples(DataSpec(data.sources))
    known = all(url in counts for url in rest.values())
    expected = sum(counts.get(url, 0) for url in rest.values())
    predicted = round(expected * _sample_bytes(encoder, next(iter(rest.values()), None)))
    _check_room(out, predicted, len(rest), known)
    unread: dict[str, str] = {}
    kept = sum(shard.samples for shard in done.values())
    with tqdm(
        total=expected + kept if known else None, initial=kept, unit=" samples", desc="encode", dynamic_ncols=True
    ) as bar:
        for file, url in rest.items():
            try:
                shard = encoder.encode_shard(url, out / file, bar.update)
            except UnreadableShard as error:
                unread[url] = str(error)
                continue
            done[file] = dataclasses.replace(shard, file=file)
            add_shard(out, done[file])
    entries = {str(out / file): (shard.samples, sum(shard.unusable.values())) for file, shard in done.items()}
    write_index({path: describe_shard(path, *counted) for path, counted in entries.items()})
    dropped = Counter[str]()
    for shard in done.values():
        dropped.update(shard.unusable)
    samples = sum(shard.samples for shard in done.values())
    return Encoded(
        out=str(out),
        format=dataclasses.asdict(form),
        shards=len(done),
        samples=samples,
        usable=samples - dropped.total(),
        dropped=dict(dropped.most_common()),
        unread=unread,
        new=samples - kept,
        bytes=sum(shard.bytes for shard in done.values()),
        predicted_bytes=predicted,
        seconds=time.monotonic() - began,
    )


def _sample_bytes(encoder: Encoder, url: str | None) -> float:
    """Predict the bytes of one sample in the cache, from the captions of the first ones of a shard."""
    sizes = []
    for item in itertools.islice(read_samples(url) if url else (), _MEASURED):
        if isinstance(item, Damage):
            continue
        size = sum(tar_bytes(len(item[name])) for name in encoder.caption_members if name in item)
        with contextlib.suppress(BadSample):
            size += encoder.form.text_bytes(len(distinct_captions(item, encoder.sources)))
        sizes.append(encoder.form.image_bytes() + size)
    return sum(sizes) / len(sizes) if sizes else encoder.form.image_bytes()


def _check_room(out: Path, predicted: int, shards: int, known: bool) -> None:
    """Print how much will be written, and raise a `UserError` if there is less room."""
    free = shutil.disk_usage(out).free
    size = f"{predicted / 2**30:,.2f} GiB" if predicted else "nothing"
    if known:
        message = f"{shards:,} shards to write, about {size}; {free / 2**30:,.1f} GiB are free"
    else:
        message = f"{shards:,} shards to write, of unknown size: not all are counted (llip doctor PATTERN --index)"
    print(f"encode: {message}", file=sys.stderr)
    if predicted > free:
        raise UserError(
            f"--out {str(out)!r}: the features take about {size}, and {free / 2**30:,.2f} GiB are free; make room, "
            "choose another folder, or --dtype int8; a mixture_head's grid makes feature maps smaller"
        )
