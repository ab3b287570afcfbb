"""From a YAML file to a checked evaluation and the program that runs it. Imports no torch."""

import importlib
from collections.abc import Callable, Sequence

from llip.clipeval.eval_config import EvalConfig, load_eval_config
from llip.errors import UserError, did_you_mean

PROGRAMS = {"mc": "evals.mc:run"}
"""eval_name -> module:function of the program, called with (config, devices), which returns the exit code."""


def load(fname: str) -> EvalConfig:
    """Read an evaluation's YAML with everything that a program needs and that online evaluation does not.

    Raises:
        UserError: see `load_eval_config`; also a missing key, keys that exclude each other, or an unknown eval_name.
    """
    config = load_eval_config(fname)
    checkpoint_keys = ("mc_config_name", "checkpoint_path")
    if config.model is not None:
        for key in checkpoint_keys:
            if getattr(config, key) is not None:
                raise UserError(f"{fname}: both model and {key}; model replaces {' and '.join(checkpoint_keys)}")
    elif config.pretrained is not None:
        raise UserError(f"{fname}: pretrained = {config.pretrained!r} without model; give the OpenCLIP model's name")
    for key in (*(() if config.model is not None else checkpoint_keys), "output_dir"):
        if getattr(config, key) is None:
            raise UserError(
                f"{fname}: key {key!r} is missing; an evaluation needs output_dir, and either model or "
                f"{' and '.join(checkpoint_keys)}"
            )
    if config.eval_name not in PROGRAMS:
        raise UserError(f"{fname}: eval_name = {config.eval_name!r}.{did_you_mean(config.eval_name, PROGRAMS)}")
    return config


def program(config: EvalConfig) -> Callable[[EvalConfig, Sequence[str]], int]:
    """Import and return the program that `config.eval_name` means."""
    module, _, function = PROGRAMS[config.eval_name].partition(":")
    return getattr(importlib.import_module(module), function)
