"""From a YAML file to a checked evaluation and the program that runs it. Imports no torch."""

import importlib
from collections.abc import Callable, Sequence

from llip.clipeval.eval_config import EvalConfig, load_eval_config
from llip.errors import UserError, did_you_mean

REQUIRED = ("mc_config_name", "checkpoint_path", "output_dir")
"""Keys that a program needs and that online evaluation in training does not."""

PROGRAMS = {"mc": "evals.mc:run"}
"""eval_name -> module:function of the program, called with (config, devices), which returns the exit code."""


def load(fname: str) -> EvalConfig:
    """Read an evaluation's YAML with everything that a program needs.

    Raises:
        UserError: see `load_eval_config`; also an unknown eval_name.
    """
    config = load_eval_config(fname, required=REQUIRED)
    if config.eval_name not in PROGRAMS:
        raise UserError(f"{fname}: eval_name = {config.eval_name!r}.{did_you_mean(config.eval_name, PROGRAMS)}")
    return config


def program(config: EvalConfig) -> Callable[[EvalConfig, Sequence[str]], int]:
    """Import and return the program that `config.eval_name` means."""
    module, _, function = PROGRAMS[config.eval_name].partition(":")
    return getattr(importlib.import_module(module), function)
