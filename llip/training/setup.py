"""Before the first step: the run's folder, its data, and everything built or restored."""

import contextlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from llip.configs import Config
from llip.data.index import load_index
from llip.data.loader import make_loader
from llip.data.position import DataPosition, Layout, shards_digest
from llip.data.sources import (
    IMAGE_KEYS,
    SCENES_SCHEME,
    ShardSource,
    by_name,
    check_shards_exist,
    is_local,
    parse_train_data,
    shard_name,
)
from llip.errors import CollectiveUserError, UserError
from llip.open_clip.factory import create_model, model_spec, spec_tokenizer
from llip.open_clip.weights.load import load_weights, read_checkpoint
from llip.system.paths import expand_variables
from llip.system.processes import Processes, raise_on_all_ranks
from llip.training.checkpoints.checkpoint import newest_good_checkpoint
from llip.training.checkpoints.provenance import differences, make_provenance
from llip.training.checkpoints.run_folder import claim_folder, locked_folder
from llip.training.checkpoints.train_state import TrainState
from llip.training.reporting.data_report import DataCounts, DataReport
from llip.training.reporting.run_log import RunLog, log, start_logging
from llip.training.reporting.sample_log import SampleLog, cut_back_ids
from llip.training.step.engine import create_engine
from llip.training.step.optimizer import create_optimizer, lock_towers
from llip.training.step.task import ContrastiveTask

_COUNTED_BYTES = 2 << 30  # local shards up to this size are counted before the start


class Run(NamedTuple):
    """What a process trains with."""

    task: ContrastiveTask
    state: TrainState
    loader: DataLoader
    run_log: RunLog
    provenance: dict[str, Any]


def _describe(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return (
            f"a file cannot be read or written: {error}. Make room or fix the folder, then run the same command again"
        )
    return str(error) if isinstance(error, UserError) else None


def _all_fail_alike(processes: Processes) -> contextlib.AbstractContextManager[None]:
    """Raise a user's or a disk's error of one process on all of them, as a `CollectiveUserError`."""
    return raise_on_all_ranks(processes, CollectiveUserError, _describe)


@contextlib.contextmanager
def open_folder(config: Config, processes: Processes) -> Iterator[None]:
    """Hold the run's folder on the main process, and start logging on all."""
    with contextlib.ExitStack() as stack:
        with _all_fail_alike(processes):
            if processes.is_main:
                stack.enter_context(locked_folder(config.folder))
                started = any((config.folder / "checkpoints").glob("*.pt"))
                notes = claim_folder(config.folder, config, started)
                if config.resume is None and started:
                    raise UserError(
                        f"run folder {str(config.folder)!r} holds checkpoints and resume=none; choose name=NAME"
                    )
            start_logging(config.folder if processes.is_main else None)
        if processes.is_main:
            for note in notes:
                log.info(note)
        yield


def check_data(config: Config, processes: Processes) -> None:
    """Make the embedded dataset if it is asked for, and compare the schedule with what the shards hold.

    Raises:
        UserError: missing or empty shards, or fewer samples than one global batch.
    """
    with _all_fail_alike(processes):
        if not processes.is_main:
            return
        for part in config.train_data.split("::"):
            if part.startswith(SCENES_SCHEME):
                from llip.scenes import ensure_scenes

                ensure_scenes(Path(expand_variables(part.removeprefix(SCENES_SCHEME))))
        sources = parse_train_data(config.train_data)
        check_shards_exist(sources)
        if config.steps_per_epoch < 1:
            raise UserError(
                f"train_num_samples = {config.train_num_samples:,} is less than one global batch of "
                f"{config.global_batch:,} pairs; give the number of pairs in train_data, or a smaller batch_size"
            )
        counts = _known_counts(sources)
        for source in sources:
            _check_readers(config, source, counts)
        _compare_counts(config, sources, counts)


def _known_counts(sources: tuple[ShardSource, ...]) -> dict[str, int]:
    """Return the samples by URL, as far as an index tells or counting is quick."""
    urls = [url for source in sources for url in source.urls]
    counts = load_index(urls)
    unknown = [url for url in urls if url not in counts]
    log.info("data: %d shards in %d datasets", len(urls), len(sources))
    quick = all(is_local(url) and Path(url).is_file() for url in unknown)
    if quick and sum(os.path.getsize(url) for url in unknown) <= _COUNTED_BYTES:
        counts |= {url: _count_samples(url) for url in unknown}
    elif unknown:
        log.info(
            "data: the samples of %d shards are not counted; python -m llip.data.doctor PATTERN --index does that",
            len(unknown),
        )
    return counts


def _check_readers(config: Config, source: ShardSource, counts: dict[str, int]) -> None:
    """Refuse more data workers than there are samples: some would have nothing to read."""
    readers = config.processes * max(1, config.workers)
    if len(source.urls) >= readers or any(url not in counts for url in source.urls):
        return
    largest = max(counts[url] for url in source.urls)
    if 0 < largest < readers:
        fix = (
            f"workers={largest // config.processes}" if largest >= config.processes else f"at most {largest} processes"
        )
        raise UserError(
            f"train_data {source.pattern!r}: {len(source.urls)} shards of at most {largest} samples cannot be shared "
            f"by {config.processes} processes x {max(1, config.workers)} workers; the most that goes is {fix}"
        )


def _compare_counts(config: Config, sources: tuple[ShardSource, ...], counts: dict[str, int]) -> None:
    urls = [url for source in sources for url in source.urls]
    if any(url not in counts for url in urls):
        return
    samples = sum(counts[url] for url in urls)
    seen = config.total_steps * config.global_batch
    log.info(
        "data: %s samples; the schedule sees %s pairs: %.2f passes", f"{samples:,}", f"{seen:,}", seen / max(1, samples)
    )
    if samples and config.train_num_samples > samples:
        ratio = config.train_num_samples / samples
        log.warning(
            "data: train_num_samples = %s, but the shards hold %s: each epoch repeats the data %.2f times",
            f"{config.train_num_samples:,}",
            f"{samples:,}",
            ratio,
        )


def _count_samples(url: str) -> int:
    """Count the images of a local shard by its headers; a damaged shard counts what can be read."""
    count = 0
    with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(url) as tar:
        for member in tar:
            count += member.name.rsplit(".", 1)[-1].lower() in IMAGE_KEYS
    return count


def build_run(config: Config, processes: Processes) -> Run:
    """Build model, optimizer and loader, and restore them from the newest good checkpoint if there is one.

    Raises:
        UserError: a name or value that does not resolve, or checkpoints of which none can be read.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    spec = model_spec(config)
    found = _starting_point(config, processes)
    model = create_model(spec, None if found else config.pretrained, config.model)
    if found:
        load_weights(model, found, "the run's checkpoint")
    model.to(processes.device)
    lock_towers(model, config)
    averaged = None if config.ema_decay is None else ModelEmaV3(model, config.ema_decay, use_warmup=True)
    if averaged is not None and found and "ema_state_dict" in found:
        load_weights(averaged.module, found["ema_state_dict"], "the run's averaged weights")
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "model: %s, K = %d, %s pooling, %s parameters",
        config.model,
        config.mixture_tokens,
        config.pooling,
        f"{parameters:,}",
    )

    engine = create_engine(config, model, processes)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "amp_fp16")
    data = _data_start(config)
    counts = DataCounts([0] * len(data.names))
    state = TrainState(create_optimizer(model, config), scaler, data.position, counts, averaged, engine)
    torch.manual_seed(config.seed + processes.rank)  # from here on each process draws its own dropout
    provenance = make_provenance(processes, _data_digest(config)) if processes.is_main else {}
    if found:
        note = state.restore(found, processes, data.layout)
        log.info("resumed at step %d of %d", state.step, config.total_steps)
        if note:
            log.warning(note)
        for difference in (
            differences(found.get("provenance", found.get("passport", {})), provenance) if processes.is_main else ()
        ):
            log.info("not as at the checkpoint: %s", difference)
    tokenizer = spec_tokenizer(spec)
    pin = processes.device.type == "cuda"
    loader = make_loader(config, tokenizer, spec.image_size, processes.rank, processes.world_size, state.position, pin)
    run_log = _open_log(config, processes, state, data.names)
    task = ContrastiveTask(model, config.loss, processes, config.score_memory)
    return Run(task, state, loader, run_log, provenance)


class _DataStart(NamedTuple):
    """What is known of the data before they are read."""

    names: list[str]  # of the datasets, for people
    layout: Layout
    position: DataPosition


def _data_start(config: Config) -> _DataStart:
    sources = [by_name(source) for source in parse_train_data(config.train_data)]
    digests = [shards_digest(shard_name(url) for url in source.urls) for source in sources]
    layout = Layout(config.seed, config.shuffle_buffer, [len(source.urls) for source in sources])
    return _DataStart([source.pattern for source in sources], layout, DataPosition(config.workers, shards=digests))


def _data_digest(config: Config) -> int:
    """Return a number that stands for the shards' names, and for the samples that an index counts in them."""
    urls = [url for source in parse_train_data(config.train_data) for url in source.urls]
    counts = load_index(urls)
    return zlib.crc32(repr([(shard_name(url), counts.get(url)) for url in urls]).encode(errors="surrogateescape"))


def _open_log(config: Config, processes: Processes, state: TrainState, names: list[str]) -> RunLog:
    samples = SampleLog(config.folder, processes.rank) if config.log_sample_ids else None
    data = DataReport(names, state.counts, config.workers)
    with _all_fail_alike(processes):  # nobody writes before the main process has cut the records back
        if processes.is_main and samples is not None:
            cut_back_ids(config.folder, state.step)
        return RunLog(config.folder if processes.is_main else None, config, state.step, data, samples)


def _starting_point(config: Config, processes: Processes) -> dict | None:
    """Return the checkpoint that the run goes on from: its own newest good one, else the one that `resume` names.

    The main process chooses, and the others read the same file.
    """
    path, content = None, None
    with _all_fail_alike(processes):
        if processes.is_main and (own := newest_good_checkpoint(config.folder / "checkpoints")):
            path, content, warnings = own
            for warning in warnings:
                log.warning("%s; %s is used instead", warning, path)
    path = processes.broadcast_object(path)
    if path is not None:
        return content or read_checkpoint(path)
    if config.resume not in (None, "latest"):
        return read_checkpoint(Path(config.resume))
    return None
