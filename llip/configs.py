"""What one run is: the frozen `Config`, overrides from the command line, and the search for a config by name.

A config is a Python function that returns a `Config`; a variant calls another one and replaces fields. This module
imports no torch, so that `--list`, `--print` and `--help` answer at once.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llip.config_checks import check_engine, check_ranges, checked, expand_paths, type_name
from llip.errors import UserError, did_you_mean
from llip.extensions import objectives, poolings

IDENTITY = "identity"  # another value makes another experiment
OPERATIONAL = "operational"  # another value changes how the same experiment is run
DERIVED = "derived"  # may change as long as the global batch stays


def _field(default: Any, meaning: str, kind: str = IDENTITY) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning, "kind": kind})


def _operational(default: Any, meaning: str) -> Any:
    return _field(default, meaning, OPERATIONAL)


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Flat, frozen, checked when made; names known from this family of trainers keep their names."""

    # Run
    name: str = _operational("", "folder of the run below `logs`; the config function's name when empty")
    logs: str = _operational("logs", "folder that holds the runs")
    seed: int = _field(0, "seed of weights, data order, captions, crops and dropout")
    resume: str | None = _operational(
        "latest", "latest: continue this run's newest good checkpoint; a path: start from it; none: refuse to continue"
    )
    deterministic: bool = _operational(False, "only deterministic kernels (slower on CUDA)")

    # Data
    train_data: str = _field(
        "", "shards: brace pattern, glob, comma list, `A.tar@0.7::B.tar@0.3`, pipe:, or scenes:DIR"
    )
    train_num_samples: int = _field(0, "pairs that make one epoch of the schedule")
    caption_keys: str = _field("txt", "caption sources: txt, json.FIELD; weighted as in json.captions:0.7,txt:0.3")
    workers: int = _operational(4, "data-loading processes per training process; 0 loads in the training process")
    shuffle_buffer: int = _field(2000, "undecoded samples per worker among which the next one is drawn")
    max_bad_fraction: float = _operational(0.1, "share of undecodable samples beyond which training stops")
    log_sample_ids: bool = _operational(False, "write the ids of every step's samples, to audit their order")

    # Model
    model: str = _field("ViT-B-16-quickgelu", "name of an OpenCLIP ViT config, or path to a json in its format")
    image_size: int | None = _field(None, "pixels per side; none: the model's own")
    context_length: int | None = _field(None, "tokens per caption; none: the model's own")
    mixture_tokens: int = _field(1, "K: outputs of the image encoder")
    pooling: str = _field(
        "text", "how K tokens become the image's feature: first, mean, learned, text, or one of your own"
    )
    pool_heads: int = _field(8, "M: heads of text-conditioned pooling")
    softmax_temperature: float = _field(5.0, "tau: divides the pooling's attention logits, in the place of sqrt(d)")
    patch_dropout: float = _field(0.0, "share of patches dropped in training")
    lock_image: bool = _field(False, "do not train the image tower, but for its mixture tokens when there are several")
    lock_text: bool = _field(False, "do not train the text tower")
    pretrained: str | None = _field(None, "weights to start from: a checkpoint file or folder, or an OpenCLIP tag")
    tokenizer: str | None = _operational(
        None, "folder of the tokenizer's files, for models whose tokenizer does not ship with OpenCLIP"
    )

    # Objective and optimisation
    loss: str = _field(
        "sigmoid", "objective over all images x all texts of the global batch: sigmoid, softmax, or one of your own"
    )
    batch_size: int = _field(256, "pairs per process and per accumulation slice", DERIVED)
    accum_freq: int = _field(1, "slices per step; the contrastive batch grows with it, the memory does not", DERIVED)
    epochs: int = _field(32, "passes over train_num_samples that the schedule spans")
    lr: float = _field(5e-4, "peak learning rate")
    beta1: float = _field(0.9, "AdamW")
    beta2: float = _field(0.95, "AdamW")
    eps: float = _field(1e-6, "AdamW")
    wd: float = _field(
        0.2, "decoupled weight decay of matrices (not of gains, biases, embeddings, tokens, logit scale)"
    )
    layer_decay: float = _field(
        1.0, "learning rate of a tower's block, as a multiple of that of the block above it; 1: the same everywhere"
    )
    warmup: int = _field(2000, "steps of linear warm-up before the cosine")
    grad_clip: float | None = _field(1.0, "largest gradient norm; none: no clipping")
    max_bad_steps: int = _operational(
        10, "steps in a row that may be skipped because loss or gradient is not finite, before the run ends"
    )
    ema_decay: float | None = _field(
        None,
        "keep an exponential moving average of the weights, its decay warmed up to this; none: no average",
    )
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = _field("amp_bf16", "arithmetic of the towers")

    # Machine
    nodes: int = _operational(1, "machines")
    ngpus: int = _operational(1, "processes per machine: GPUs, or CPU processes with device=cpu")
    score_memory: float | None = _operational(
        None, "GiB that text-conditioned scores may take; less is slower, not smaller; none: 0.5 on CPU, 2 on GPU"
    )
    device: Literal["auto", "cuda", "cpu"] = _operational("auto", "auto: CUDA where there is a GPU")
    timeout_minutes: float = _operational(
        10.0, "minutes that a process may stay at one point before the run ends; six times as long to save or evaluate"
    )
    distributed_engine: Literal["ddp", "fsdp"] = _operational(
        "ddp",
        "ddp: all weights on every process; fsdp: a share on each (FSDP2), without ema_decay and amp_fp16",
    )
    grad_checkpointing: bool = _operational(False, "recompute the towers' blocks in the backward pass: memory for time")
    torchcompile: bool = _operational(False, "compile both towers; on a CPU that needs a C++ compiler")

    # Log, checkpoints, evaluation (0 switches any of them off)
    log_steps: int = _operational(10, "steps between lines of metrics.jsonl")
    profile_steps: str | None = _operational(
        None, "FIRST-LAST: steps that the main process runs under PyTorch's profiler, as in 20-25"
    )
    save_frequency: int = _operational(1, "epochs between checkpoints")
    save_steps: int = _operational(0, "steps between checkpoints")
    save_minutes: float = _operational(0.0, "minutes between checkpoints")
    keep_checkpoints: int = _operational(3, "newest step_<N>.pt files kept; 0 keeps all")
    keep_every: int = _operational(0, "epochs between checkpoints that are kept for good, beside the newest")
    eval_steps: int = _operational(0, "steps between online zero-shot evaluations")
    evals: tuple[str, ...] = _operational((), "evaluation YAMLs for the online evaluations")
    report_to: tuple[str, ...] = _operational(
        ("tensorboard",), "loggers beside metrics.jsonl: tensorboard, wandb, or none"
    )

    def __post_init__(self) -> None:
        for name, field in config_fields().items():
            object.__setattr__(self, name, checked(name, field.type, getattr(self, name)))
        expand_paths(self)
        check_ranges(self)
        check_engine(self)

    @property
    def processes(self) -> int:
        return self.nodes * self.ngpus

    @property
    def global_batch(self) -> int:
        """Pairs per optimizer step over all processes and accumulation slices."""
        return self.batch_size * self.processes * self.accum_freq

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

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values; an unknown field is a `UserError` that names the nearest one."""
        for name in changes:
            _check_field_name(name)
        return dataclasses.replace(self, **changes)


def config_fields() -> dict[str, dataclasses.Field]:
    """Return the fields of `Config` by name, in the order of declaration."""
    return {field.name: field for field in dataclasses.fields(Config)}


def _check_field_name(name: str) -> None:
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
    "lock_image_unlocked_groups": "lock_image locks the whole image tower; layer_decay trains its lower blocks less.",
}
"""Names that users of neighbouring trainers type, with what to do instead."""


def parse_value(name: str, text: str) -> Any:
    """Read `text` from the command line as the declared type of field `name`.

    Accepts Python's number forms (5e-4, 400_000_000), true/false, none, bare strings and comma lists.

    Raises:
        UserError: the text does not read as that type.
    """
    kind = config_fields()[name].type
    optional = isinstance(kind, types.UnionType)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if text.lower() == "none" and (optional or typing.get_origin(kind) is tuple):
        return None if optional else ()
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            number = float(text) if "e" in text.lower() or "." in text else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"config field {name} = {text!r}: expected {type_name(kind)}") from None
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Turn `field=value` words into typed values; a leftover or unknown word is a `UserError`."""
    changes: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"cannot read {word!r}: overrides are written field=value, for instance batch_size=64")
        _check_field_name(name)
        if name in changes:
            raise UserError(f"config field {name} is given twice")
        changes[name] = parse_value(name, text)
    return changes


def list_configs() -> dict[str, Callable[[], Config]]:
    """Return every config function in `llip.run_configs` by name."""
    package = importlib.import_module("llip.run_configs")
    found: dict[str, Callable[[], Config]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_"):
                assert name not in found, f"two configs are called {name}"
                found[name] = function
    return found


def read_file(path: Path) -> types.ModuleType:
    """Run a Python file of the user's, with configs in it or with what it registers, and return it as a module.

    Raises:
        UserError: it is not there, is not Python, or does not run.
    """
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} is not there; expected path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"llip_user_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {str(path)!r} is not a Python file; expected path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {str(path)!r} does not run: {type(error).__name__}: {error}") from error
    return module


def own_files(config: Config) -> list[Path]:
    """Return the files that register what `config` names and the project does not ship: `read_file` reads them again.

    Raises:
        UserError: something was not registered in a file.
    """
    found = (poolings.source(config.pooling), objectives.source(config.loss))
    return list(dict.fromkeys(path for path in found if path is not None))


def _function_from_file(path: Path, function_name: str) -> Callable[[], Config]:
    module = read_file(path)
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    if function_name not in functions:
        raise UserError(f"no config {function_name!r} in {path}.{did_you_mean(function_name, functions)}")
    return functions[function_name]


def search_config(name: str, overrides: list[str] | None = None) -> Config:
    """Resolve a config by name, or as `path/to/file.py:function`, and apply `field=value` overrides.

    Raises:
        UserError: unknown config or field (with the nearest names), wrong type or value.
    """
    file, separator, function_name = name.rpartition(":")
    if separator and (file.endswith(".py") or "/" in file):
        function = _function_from_file(Path(file), function_name)
    else:
        configs = list_configs()
        if name not in configs:
            raise UserError(f"unknown config {name!r}.{did_you_mean(name, configs)} (--list shows all of them)")
        function, function_name = configs[name], name
    try:
        config = function()
    except TypeError as error:
        raise UserError(f"config {name}: {error}. Config fields: {', '.join(config_fields())}") from error
    if not isinstance(config, Config):
        raise UserError(f"config {name} returned {type(config).__name__}, expected llip.configs.Config")
    config = config.replace(**parse_overrides(overrides or []))
    return config if config.name else config.replace(name=function_name)
