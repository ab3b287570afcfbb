"""Before the first step: the run's folder, its data, and everything built or restored."""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from llip.clipeval.catalog.catalog import load_evaluation
from llip.configs import Config
from llip.data import check
from llip.data.features.cache import cached_data
from llip.data.features.made_with import check_made_with
from llip.data.index import load_index
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition, Layout, shards_digest
from llip.data.sources import SCENES_SCHEME, DataSpec, is_local, parse_train_data, shard_name
from llip.errors import CollectiveUserError, UserError
from llip.extensions import FOLDER, copy_extensions, extension_files, find_extension
from llip.open_clip.factory import ModelSpec, create_model, model_spec, spec_tokenizer
from llip.open_clip.model import Llip
from llip.open_clip.towers.locks import lock_towers
from llip.open_clip.weights.load import load_weights, read_checkpoint
from llip.system.paths import expand_variables
from llip.system.processes import Processes, raise_on_all_ranks
from llip.training.checkpoints.checkpoint import newest_good_checkpoint
from llip.training.checkpoints.provenance import make_provenance
from llip.training.checkpoints.run_folder import claim_folder, differences, locked_folder
from llip.training.checkpoints.train_state import TrainState
from llip.training.reporting.data_report import DataCounts, DataReport
from llip.training.reporting.run_log import RunLog, log, start_logging
from llip.training.reporting.sample_log import SampleLog, cut_back_ids
from llip.training.step.create_engine import create_engine
from llip.training.step.optimizer import create_optimizer
from llip.training.step.task import ContrastiveTask


class Run(NamedTuple):
    """What a process trains with."""

    task: ContrastiveTask
    state: TrainState
    loader: DataLoader
    run_log: RunLog
    provenance: dict[str, Any]


def _describe(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return f"a file cannot be read or written: {error}; make room or fix the folder, and run the command again"
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
                copy_extensions(extension_files(vars(config)).values(), config.folder / FOLDER)
            start_logging(config.folder if processes.is_main else None)
        if processes.is_main:
            for note in notes:
                log.info(note)
            for warning in config.warnings():
                log.warning(warning)
        yield


def check_request(config: Config) -> None:
    """Check what a run needs beside its data: model, extensions, schedule, evaluation files with catalogs and tasks.

    Raises:
        UserError: something is missing or wrong.
    """
    model_spec(config)
    for field in extension_files(vars(config)):
        find_extension(field, getattr(config, field))
    check.check_schedule(config)
    for file in config.evals if config.eval_steps else ():
        load_evaluation(file)


def check_data(config: Config, processes: Processes) -> DataSpec:
    """Check the request, and return what the run reads: what `train_data` names, or a cache of its features.

    Raises:
        UserError: a mistake of the config, or data that cannot be what it asks for; on every process.
    """
    data = None
    with _all_fail_alike(processes):
        if processes.is_main:
            check_request(config)
            data = find_data(config)
            if config.feature_cache is not None:
                data = cached_data(config, data)
            check.check_data(config, data)
    return processes.broadcast_object(data)


def find_data(config: Config) -> DataSpec:
    """Render the embedded dataset if it is asked for, and return what `train_data` names.

    Raises:
        UserError: `train_data` cannot be read, or names no file.
    """
    for part in config.train_data.split("::"):
        if part.startswith(SCENES_SCHEME):
            from llip.scenes import ensure_scenes

            ensure_scenes(Path(expand_variables(part.removeprefix(SCENES_SCHEME))))
    return parse_train_data(config.train_data)


def build_run(config: Config, data: DataSpec, processes: Processes) -> Run:
    """Build model, optimizer and loader, and restore them from the newest good checkpoint if there is one.

    Raises:
        UserError: a name or value that does not resolve, or checkpoints of which none can be read.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    spec = model_spec(config)
    tokenizer, checkpoint = spec_tokenizer(spec), starting_point(config, processes)
    model = start_model(config, spec, checkpoint, processes.device)
    if config.feature_cache is not None:
        with _all_fail_alike(processes):
            if processes.is_main:
                check_made_with(config, spec, model, tokenizer)
    averaged = None if config.ema_decay is None else ModelEmaV3(model, config.ema_decay, use_warmup=True)
    if averaged is not None and checkpoint is not None and "ema_state_dict" in checkpoint:
        load_weights(averaged.module, checkpoint["ema_state_dict"], "the run's averaged weights")
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
    layout = Layout(config.seed, config.shuffle_buffer, data.shard_counts)
    digests = [shards_digest(shard_name(url) for url in source.urls) for source in data.sources]
    position = DataPosition(config.workers, shards=digests)
    counts = DataCounts([0] * len(data.sources))
    state = TrainState(create_optimizer(model, config), scaler, position, counts, averaged, engine)
    torch.manual_seed(config.seed + processes.rank)  # from here on each process draws its own dropout
    provenance = make_provenance(processes, _data_digest(data)) if processes.is_main else {}
    if checkpoint is not None:
        note = state.restore(checkpoint, processes, layout)
        log.info("resumed at step %d of %d", state.step, config.total_steps)
        if processes.is_main:
            if note:
                log.warning(note)
            for difference in differences(checkpoint.get("provenance", checkpoint.get("passport", {})), provenance):
                log.info("changed since the checkpoint: %s", difference)
    place = {"rank": processes.rank, "processes": processes.world_size}
    dataset = CaptionedImages(
        config, data, tokenizer, spec.image_size, state.position, **place, resize_mode=spec.resize_mode
    )
    loader = make_loader(dataset, pin=processes.device.type == "cuda")
    run_log = _open_log(config, processes, state, data)
    task = ContrastiveTask(model, config, processes)
    return Run(task, state, loader, run_log, provenance)


def start_model(config: Config, spec: ModelSpec, checkpoint: dict | None, device: torch.device) -> Llip:
    """Return the model that a run starts or continues with, on its device, with the config's locks.

    Args:
        config: the run.
        spec: its model.
        checkpoint: to continue from, see `starting_point`.
        device: of the process.

    Raises:
        UserError: weights that are missing or do not fit, or nothing left to train.
    """
    torch.manual_seed(config.seed)
    model = create_model(spec) if checkpoint else create_model(spec, config.pretrained, config.model)
    if checkpoint is not None:
        load_weights(model, checkpoint, "the run's checkpoint")
    model.to(device)
    lock_towers(model, config.lock_image, config.lock_text)
    return model


def _data_digest(data: DataSpec) -> int:
    """Return a hash of the shards' names and of the sizes of local ones."""
    sizes = [os.path.getsize(url) if is_local(url) and os.path.isfile(url) else None for url in data.urls]
    names = [shard_name(url) for url in data.urls]
    return zlib.crc32(repr(list(zip(names, sizes, strict=True))).encode(errors="surrogateescape"))


def _open_log(config: Config, processes: Processes, state: TrainState, data: DataSpec) -> RunLog:
    samples = SampleLog(config.folder, processes.rank) if config.log_sample_ids else None
    slots = config.processes * max(1, config.workers)
    report = DataReport(
        [source.pattern for source in data.sources],
        state.counts,
        config.workers,
        [shards if shards >= slots else shards * slots for shards in data.shard_counts],
        config.max_bad_fraction,
        load_index(data.urls) if processes.is_main else {},
    )
    with _all_fail_alike(processes):  # nobody writes before the main process has cut the records back
        if processes.is_main and samples is not None:
            cut_back_ids(config.folder, state.step)
        return RunLog(config.folder if processes.is_main else None, config, state.step, report, samples)


def starting_point(config: Config, processes: Processes) -> dict | None:
    """Return the checkpoint to continue from: the run's newest good one, else the one that `resume` names, else None.

    The main process chooses, and the others read the same file.
    """
    path, content = None, None
    with _all_fail_alike(processes):
        if processes.is_main and (newest := newest_good_checkpoint(config.folder / "checkpoints")):
            path, content, warnings = newest
            for warning in warnings:
                log.warning("%s; %s is used instead", warning, path)
    path = processes.broadcast_object(path)
    if path is not None:
        return content or read_checkpoint(path)
    if config.resume not in (None, "latest"):
        return read_checkpoint(Path(config.resume))
    return None
