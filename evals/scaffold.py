"""An evaluation's YAML, checked for everything that a program needs. Imports no torch."""

from llip.clipeval.eval_config import EvalConfig, load_eval_config
from llip.errors import UserError

CHECKPOINT_KEYS = ("mc_config_name", "checkpoint_path")
"""Keys that name a run's checkpoint, instead of `model`."""


def load(fname: str) -> EvalConfig:
    """Read an evaluation's YAML with everything that a program needs and that online evaluation does not.

    Raises:
        UserError: as `load_eval_config`; also a missing key, or keys that exclude each other.
    """
    config = load_eval_config(fname)
    both = " and ".join(CHECKPOINT_KEYS)
    excluded = CHECKPOINT_KEYS if config.model is not None else ("pretrained",)
    required = ("output_dir",) if config.model is not None else (*CHECKPOINT_KEYS, "output_dir")
    for key in excluded:
        if getattr(config, key) is not None:
            fix = f"model replaces {both}" if config.model is not None else "give the OpenCLIP model's name as model"
            raise UserError(f"{fname}: {key} = {getattr(config, key)!r} does not go with the other keys; {fix}")
    for key in required:
        if getattr(config, key) is None:
            raise UserError(f"{fname}: key {key!r} is missing; expected output_dir, and either model or {both}")
    return config
