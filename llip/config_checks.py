"""What the values of a config may be: their types, their ranges, and what does not go together. Imports no torch."""

import math
import types
import typing
from typing import TYPE_CHECKING, Any, Literal

from llip.errors import UserError, did_you_mean
from llip.extensions import objectives, poolings
from llip.system.paths import expand_variables, is_below, unset_variables

if TYPE_CHECKING:
    from llip.configs import Config

LOGGERS = ("tensorboard", "wandb")


def type_name(kind: Any) -> str:
    """Return a field's declared type in words."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if part is types.NoneType else type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def checked(name: str, kind: Any, value: Any) -> Any:
    """Return `value` as the field's declared type, or raise the error that names field, value and type."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        inner = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return checked(name, inner[0], value)
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    hint = did_you_mean(str(value), typing.get_args(kind)) if typing.get_origin(kind) is Literal else ""
    raise UserError(f"config field {name} = {value!r}: expected {type_name(kind)}.{hint}")


def expand_paths(config: "Config") -> None:
    """Expand `~` and variables in the fields that hold paths; `train_data` expands its own.

    Raises:
        UserError: `logs` names a variable that is not set, or `name` a folder outside `logs`.
    """
    for name in ("logs", "resume", "model", "pretrained", "tokenizer"):
        if (value := getattr(config, name)) is not None:
            object.__setattr__(config, name, expand_variables(value))
    object.__setattr__(config, "evals", tuple(map(expand_variables, config.evals)))
    if unset := unset_variables(config.logs):
        raise UserError(f"config field logs = {config.logs!r}: the environment variable {unset[0]} is not set")
    if config.name and not is_below(config.name):
        raise UserError(f"config field name = {config.name!r}: expected a folder below logs; move runs with logs=DIR")


def check_ranges(config: "Config") -> None:
    """Refuse numbers that are out of range and names that nobody knows.

    Raises:
        UserError: names field, value and what was expected.
    """
    positive = (
        "batch_size",
        "accum_freq",
        "epochs",
        "nodes",
        "ngpus",
        "mixture_tokens",
        "pool_heads",
        "shuffle_buffer",
        "max_bad_steps",
    )
    for name in positive:
        if getattr(config, name) < 1:
            raise UserError(f"config field {name} = {getattr(config, name)}: expected at least 1")
    switches = (
        "workers",
        "log_steps",
        "save_frequency",
        "save_steps",
        "save_minutes",
        "keep_checkpoints",
        "keep_every",
        "eval_steps",
    )
    for name in (*switches, "warmup", "wd", "train_num_samples", "lr"):
        value = getattr(config, name)
        if value < 0 or not math.isfinite(value):
            raise UserError(f"config field {name} = {value}: expected 0 or more")
    for name in ("beta1", "beta2", "max_bad_fraction", "patch_dropout", "layer_decay", "ema_decay"):
        value = getattr(config, name)
        if value is not None and (
            not 0 <= value <= 1 or (value == 1 and name not in ("max_bad_fraction", "layer_decay"))
        ):
            raise UserError(f"config field {name} = {value}: expected a number from 0 to 1")
    for name in (
        "softmax_temperature",
        "eps",
        "grad_clip",
        "image_size",
        "context_length",
        "score_memory",
        "timeout_minutes",
    ):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"config field {name} = {value}: expected more than 0")
    for name, registry in (("pooling", poolings), ("loss", objectives)):
        if getattr(config, name) not in registry:
            value = getattr(config, name)
            known = ", ".join(map(repr, registry))
            raise UserError(f"config field {name} = {value!r}: expected one of {known}.{did_you_mean(value, registry)}")
    for logger in config.report_to:
        if logger not in LOGGERS:
            raise UserError(f"config field report_to = {logger!r}: expected {', '.join(LOGGERS)}, or none")


def check_engine(config: "Config") -> None:
    """Refuse what needs all weights, or all gradients, on every process.

    Raises:
        UserError: names the two fields that do not go together.
    """
    if config.distributed_engine == "ddp":
        return
    if config.ema_decay is not None:
        raise UserError(
            f"ema_decay = {config.ema_decay} with distributed_engine = 'fsdp': the average is kept whole on every "
            "process, which fsdp is there to avoid; set ema_decay=none or distributed_engine=ddp"
        )
    if config.precision == "amp_fp16":
        raise UserError(
            "precision = 'amp_fp16' with distributed_engine = 'fsdp': loss scaling does not look at all processes' "
            "shares of a gradient; set precision=amp_bf16 or distributed_engine=ddp"
        )
