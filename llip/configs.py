"""One training run as a value: the frozen `Config`, each field with its meaning and its bounds beside it.

A config is a Python function that returns a `Config`; a variant calls another one and replaces fields
(`llip.config_search` finds them). Imports no torch, so that `--list`, `--print` and `--help` answer at once.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from llip.config_checks import (
    ABOVE_0,
    AT_LEAST_1,
    FROM_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    INT64,
    SIZE,
    Bounds,
    check_bounds,
    check_text,
    checked,
    collect_errors,
    expanded,
    parse_window,
)  # fmt: skip
from llip.errors import UserError, did_you_mean, shown
from llip.extensions import SHIPPED, check_extension
from llip.system.paths import is_below, unset_variables

IDENTITY = "identity"  # another value makes another experiment
OPERATIONAL = "operational"  # another value changes how the same experiment is run
DERIVED = "derived"  # may change as long as the global batch stays


def _field(default: Any, meaning: str, kind: str = IDENTITY, *, bounds: Bounds | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning, "kind": kind, "bounds": bounds})


def _operational(default: Any, meaning: str, *, bounds: Bounds | None = None) -> Any:
    return _field(default, meaning, OPERATIONAL, bounds=bounds)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Flat, frozen, checked when made; field names of this family of trainers are kept."""

    # Run
    name: str = _operational("", "folder of the run below `logs`; the config function's name when empty")
    logs: str = _operational("logs", "folder that holds the runs")
    seed: int = _field(0, "seed of weights, data order, captions, crops and dropout", bounds=INT64)
    resume: str | None = _operational(
        "latest", "latest: continue this run's newest good checkpoint; a path: start from it; none: refuse to continue"
    )
    deterministic: bool = _operational(False, "deterministic kernels only (slower on CUDA)")

    # Data
    train_data: str = _field(
        "", "shards: brace pattern, glob, comma list, `A.tar@0.7::B.tar@0.3`, pipe:, or scenes:DIR"
    )
    train_num_samples: int = _field(0, "pairs per epoch of the schedule", bounds=FROM_0)
    caption_keys: str = _field("txt", "caption sources: txt, json.FIELD; weighted as in json.captions:0.7,txt:0.3")
    captions_per_image: int = _field(
        1,
        "N: captions per image and step, distinct while an image has enough",
        bounds=Bounds("at least 1", 1, 256),
    )
    caption_fill: Literal["repeat", "mask"] = _field(
        "repeat", "an image with fewer captions: repeat draws them again, mask trains on each once"
    )
    caption_sentences: int = _field(
        0,
        "a caption is 1 to so many sentences of all of an image's captions, neighbours or any; 0: captions as they are",
        bounds=Bounds("0 or more", 0, 100),
    )
    image_transform: str | None = _field(
        None, "path/file.py:Name: maps a decoded image (uint8 [H, W, 3]) and a seed to an image, before the crop"
    )
    image_crop: Literal["random", "center"] = _field(
        "random", "random: a crop of 90 to 100 % of the area; center: the evaluation's resize and center crop"
    )
    caption_transform: str | None = _field(None, "path/file.py:Name: maps a caption and a seed to a caption")
    feature_cache: str | None = _operational(
        None, "folder written by `llip encode`: frozen features are read from it instead of images and captions"
    )
    workers: int = _operational(
        4,
        "data-loading processes per training process; 0 loads in the training process",
        bounds=Bounds("0 or more", 0, 512),
    )
    shuffle_buffer: int = _field(
        2000, "undecoded samples per worker to shuffle among", bounds=Bounds("at least 1", 1, 1_000_000)
    )
    max_bad_fraction: float = _operational(
        0.1, "fraction of unusable samples, or of lost shards, above which training stops", bounds=FROM_0_TO_1
    )
    log_sample_ids: bool = _operational(False, "record the sample ids of every step, to audit the order")

    # Model
    model: str = _field("ViT-B-16-quickgelu", "name of an OpenCLIP ViT config, or path to a json in its format")
    image_size: int | None = _field(None, "pixels per side; none: the model's own", bounds=SIZE)
    context_length: int | None = _field(None, "tokens per caption; none: the model's own", bounds=SIZE)
    mixture_tokens: int = _field(1, "K: outputs of the image encoder", bounds=SIZE)
    pooling: str = _field(
        "text",
        "how tokens are pooled into the image feature: first, mean, learned, text, flair, or path/file.py:Name",
    )
    pair_tokens: Literal["mixture", "patches", "both"] = _field(
        "mixture", "what texts attend to: the mixture tokens, the image tower's patch outputs, or both"
    )
    pool_heads: int = _field(8, "M: heads of text-conditioned pooling", bounds=AT_LEAST_1)
    softmax_temperature: float = _field(
        5.0,
        "tau: divides the attention logits of text pooling, instead of sqrt(d)",
        bounds=Bounds("at least 0.001", 1e-3, 1e6),
    )
    patch_dropout: float = _field(0.0, "fraction of patches dropped in training", bounds=FROM_0_BELOW_1)
    lock_image: bool | int | Literal["backbone"] = _field(
        False,
        "freeze the image tower: true, except its mixture tokens if it has several; backbone: all below a "
        "mixture_head; N: all below its last N blocks",
        bounds=AT_LEAST_1,
    )
    lock_text: bool | Literal["encoder"] = _field(
        False, "freeze the text tower: true; encoder, all below its projection"
    )
    pretrained: str | None = _field(None, "weights to start from: a checkpoint file or folder, or an OpenCLIP tag")
    tokenizer: str | None = _operational(
        None, "folder of the tokenizer's files, for models whose tokenizer does not ship with OpenCLIP"
    )

    # Objective and optimisation
    loss: str = _field(
        "sigmoid",
        "objective over all images and texts: sigmoid, softmax, softmax_in, flair_sampled, or path/file.py:Name",
    )
    global_loss_weight: float = _field(
        0.0,
        "weight of the same objective on text-free image features; that of text-conditioned scores is the rest to 1",
        bounds=FROM_0_TO_1,
    )
    batch_size: int = _field(256, "images per process and micro-batch", DERIVED, bounds=AT_LEAST_1)
    accum_freq: int = _field(
        1,
        "micro-batches per step; the contrastive batch grows with it, the memory does not",
        DERIVED,
        bounds=AT_LEAST_1,
    )
    epochs: int = _field(32, "epochs of train_num_samples in the schedule", bounds=AT_LEAST_1)
    lr: float = _field(5e-4, "peak learning rate", bounds=FROM_0)
    beta1: float = _field(0.9, "AdamW", bounds=FROM_0_BELOW_1)
    beta2: float = _field(0.95, "AdamW", bounds=FROM_0_BELOW_1)
    eps: float = _field(1e-6, "AdamW", bounds=ABOVE_0)
    wd: float = _field(
        0.2, "decoupled weight decay of matrices (not of gains, biases, embeddings, tokens, logit scale)", bounds=FROM_0
    )
    layer_decay: float = _field(
        1.0,
        "learning-rate factor from each block of a tower to the block below; 1: the same rate everywhere",
        bounds=FROM_0_TO_1,
    )
    warmup: int = _field(2000, "steps of linear warm-up before the cosine", bounds=FROM_0)
    grad_clip: float | None = _field(1.0, "maximum gradient norm; none: no clipping", bounds=ABOVE_0)
    max_bad_steps: int = _operational(
        10,
        "consecutive steps skipped for a non-finite loss or gradient before the run ends",
        bounds=AT_LEAST_1,
    )
    ema_decay: float | None = _field(
        None,
        "decay of an exponential moving average of the weights, warmed up to this value; none: no average",
        bounds=FROM_0_BELOW_1,
    )
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = _field("amp_bf16", "precision of the towers")

    # Machine
    nodes: int = _operational(1, "machines", bounds=AT_LEAST_1)
    ngpus: int = _operational(1, "processes per machine: GPUs, or CPU processes with device=cpu", bounds=AT_LEAST_1)
    score_memory: float | None = _operational(
        None,
        "GiB that text-conditioned scores may take; less is slower, not smaller; none: 0.5 on CPU, 2 on GPU",
        bounds=ABOVE_0,
    )
    score_kernel: Literal["auto", "eager", "triton"] = _operational(
        "auto", "who computes text-conditioned scores: auto takes Triton kernels on CUDA where they agree with eager"
    )
    device: Literal["auto", "cuda", "cpu"] = _operational("auto", "auto: CUDA where there is a GPU")
    timeout_minutes: float = _operational(
        10.0,
        "minutes that a process may stay at one point before the run ends; six times as long to save or evaluate",
        bounds=Bounds("at least 0.05", 0.05, 2**31),
    )
    distributed_engine: Literal["ddp", "fsdp"] = _operational(
        "ddp",
        "ddp: all weights on every process; fsdp: a share on each (FSDP2), without ema_decay and amp_fp16",
    )
    grad_checkpointing: bool = _operational(False, "recompute the towers' blocks in the backward pass: memory for time")
    torchcompile: bool = _operational(False, "compile both towers; on a CPU that needs a C++ compiler")

    # Log, checkpoints, evaluation (0 switches any of them off)
    log_steps: int = _operational(10, "steps between lines of metrics.jsonl", bounds=FROM_0)
    profile_steps: str | None = _operational(
        None, "FIRST-LAST: steps that the main process runs under PyTorch's profiler, as in 20-25"
    )
    save_frequency: int = _operational(1, "epochs between checkpoints", bounds=FROM_0)
    save_steps: int = _operational(0, "steps between checkpoints", bounds=FROM_0)
    save_minutes: float = _operational(0.0, "minutes between checkpoints", bounds=FROM_0)
    keep_checkpoints: int = _operational(3, "newest step_<N>.pt files kept; 0 keeps all", bounds=FROM_0)
    keep_every: int = _operational(
        0, "epochs between checkpoints that are kept for good, beside the newest", bounds=FROM_0
    )
    eval_steps: int = _operational(0, "steps between online zero-shot evaluations", bounds=FROM_0)
    evals: tuple[str, ...] = _operational((), "evaluation YAMLs for the online evaluations")
    report_to: tuple[str, ...] = _operational(
        ("tensorboard",), "loggers beside metrics.jsonl: tensorboard, wandb, or none"
    )

    def __post_init__(self) -> None:
        with collect_errors() as errors:
            for name, field in config_fields().items():
                try:
                    value = checked(name, field.type, getattr(self, name))
                    check_bounds(name, value, field.metadata["bounds"])
                    check_text(name, value, field.default)
                    object.__setattr__(self, name, expanded(value) if name in _PATHS else value)
                except UserError as error:
                    errors.append(str(error))
        _check_names(self)
        _check_engine(self)

    @property
    def processes(self) -> int:
        return self.nodes * self.ngpus

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all processes and micro-batches."""
        return self.batch_size * self.processes * self.accum_freq

    @property
    def global_texts(self) -> int:
        """T: captions per optimizer step."""
        return self.global_batch * self.captions_per_image

    @property
    def steps_per_epoch(self) -> int:
        """floor(train_num_samples / global batch); the remainder is carried into the next epoch."""
        return self.train_num_samples // self.global_batch

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def folder(self) -> Path:
        """The run's folder, `<logs>/<name>`."""
        return Path(self.logs) / self.name

    def warnings(self) -> list[str]:
        """Return a message for each setting that is legal but hardly meant."""
        steps, messages = self.total_steps, []
        if self.warmup >= steps > 0:
            messages.append(
                f"warmup = {self.warmup:,} steps of {steps:,}: the learning rate never reaches its peak; set a smaller "
                "warmup, or more epochs"
            )
        if self.evals and not self.eval_steps:
            messages.append("evals without eval_steps: no evaluation will run; set eval_steps=N, or evals=none")
        if self.eval_steps and not self.evals:
            messages.append("eval_steps without evals: no evaluation will run; set evals=FILE.yaml, or eval_steps=0")
        if self.lr == 0:
            messages.append("lr = 0: nothing is trained")
        if self.profile_steps and parse_window(self.profile_steps)[1] > steps > 0:
            messages.append(f"profile_steps = {self.profile_steps} ends after the last step, {steps:,}: no profile")
        if self.context_length is not None and self.context_length < 4:
            messages.append(f"context_length = {self.context_length} leaves no room for words beside start and end")
        return messages

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values; an unknown field is a `UserError` that names the nearest one."""
        for name in changes:
            check_field_name(name)
        return dataclasses.replace(self, **changes)


FIELD_GROUPS = {
    "name": "Run",
    "train_data": "Data",
    "model": "Model",
    "loss": "Objective and optimisation",
    "nodes": "Machine",
    "log_steps": "Log, checkpoints, evaluation (0 switches any of them off)",
}
"""First field of each group of `Config` -> the group's title."""


def config_fields() -> dict[str, dataclasses.Field]:
    """Return the fields of `Config` by name, in the order of declaration."""
    return {field.name: field for field in dataclasses.fields(Config)}


def check_field_name(name: str) -> None:
    if name not in config_fields():
        if name in REFUSED_NAMES:
            raise UserError(f"config field {name!r} is not needed here: {REFUSED_NAMES[name]}")
        raise UserError(f"unknown config field {name!r}.{did_you_mean(name, config_fields())}")


REFUSED_NAMES = {
    "local_loss": "there is one loss, over all images and all texts of the global batch, and it is exact. Drop it.",
    "weight_scale": "the published configs' weight scale is the softmax temperature: the field is softmax_temperature.",
    "gather_with_grad": "gradients always flow to the texts of every process. Drop it.",
    "grad_clip_norm": "the field is called grad_clip.",
    "zeroshot_steps": "the field is called eval_steps.",
    "lock_image_unlocked_groups": "lock_image=N freezes all below the image tower's last N blocks.",
    "lock_text_unlocked_layers": "lock_text=encoder freezes all below the projection.",
}
"""Names that users of neighbouring trainers type, with what to do instead."""


_PATHS = ("logs", "resume", "model", "pretrained", "tokenizer", "evals", "feature_cache")
"""Fields in which `~` and variables are expanded; `train_data` expands its own."""
LOGGERS = ("tensorboard", "wandb")
TEXT_FREE_POOLINGS = ("first", "mean", "learned")
ATTENTION_POOLINGS = ("text", "flair")
"""Shipped poolings in which texts attend to tokens of the image."""


def _check_names(config: Config) -> None:
    """Raise a UserError for a run folder outside `logs`, and for names that nothing here has."""
    if unset := unset_variables(config.logs):
        raise UserError(f"config field logs = {config.logs!r}: the environment variable {unset[0]} is not set")
    if config.name and not is_below(config.name):
        raise UserError(
            f"config field name = {shown(config.name)}: expected a folder below logs; move runs with logs=DIR"
        )
    if config.profile_steps is not None:
        parse_window(config.profile_steps)
    for field in SHIPPED:
        check_extension(field, getattr(config, field))
    if config.global_loss_weight and config.pooling in TEXT_FREE_POOLINGS:
        raise UserError(
            f"config field global_loss_weight = {config.global_loss_weight}: {config.pooling!r} pooling is text-free "
            "already; set global_loss_weight=0, or pooling=text"
        )
    if config.pair_tokens != "mixture" and config.pooling in TEXT_FREE_POOLINGS:
        raise UserError(
            f"config field pair_tokens = {config.pair_tokens!r}: {config.pooling!r} pooling weighs the mixture tokens; "
            "set pair_tokens=mixture, or pooling=text"
        )
    for logger in config.report_to:
        if logger not in LOGGERS:
            raise UserError(f"config field report_to = {shown(logger)}: expected {', '.join(LOGGERS)}, or none")


def _check_engine(config: Config) -> None:
    """Raise a UserError for fields that need all weights, or all gradients, on every process, under FSDP."""
    if config.distributed_engine == "ddp":
        return
    if config.ema_decay is not None:
        raise UserError(
            f"ema_decay = {config.ema_decay} with distributed_engine = 'fsdp': every process would keep the full "
            "average, which fsdp is there to avoid; set ema_decay=none or distributed_engine=ddp"
        )
    if config.precision == "amp_fp16":
        raise UserError(
            "precision = 'amp_fp16' with distributed_engine = 'fsdp': loss scaling does not see all processes' "
            "shards of a gradient; set precision=amp_bf16 or distributed_engine=ddp"
        )
