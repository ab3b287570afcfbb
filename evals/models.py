"""The model of an evaluation: a run's checkpoint, or anything else that `llip.open_model` opens."""

from pathlib import Path

import llip
from evals.results import CheckpointIdentity, ModelIdentity
from llip.clipeval.eval_config import EvalConfig
from llip.config_search import search_config
from llip.errors import UserError
from llip.extensions import FOLDER
from llip.open_clip.factory import check_model_matches, find_model_weights
from llip.open_clip.model import Llip
from llip.system.paths import expand_path, expand_variables, unset_variables

_BESIDE: tuple[str, ...] = (
    "config.json", "open_clip_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model",
    f"{FOLDER}/*.py", f"../{FOLDER}/*.py",
)  # fmt: skip
"""Files beside the weights that decide what the model computes: its config, tokenizer and pooling."""


def identify_model(config: EvalConfig, weights: Path, precision: str) -> ModelIdentity:
    """Return what results are of, given the file of weights: its content counts, not where it lies."""
    _, pretrained = _source(config)
    name, beside = config.mc_config_name, _BESIDE
    if pretrained is not None:  # an OpenCLIP model by name
        is_tag = not Path(pretrained).exists()
        name, beside = f"{config.model} {pretrained}" if is_tag else config.model, () if is_tag else _BESIDE
    files = sorted(path for pattern in beside for path in weights.parent.glob(pattern) if path.is_file())
    checkpoint = CheckpointIdentity.of(weights, files)
    return ModelIdentity(name, checkpoint, config.prompt_ensemble, precision, config.ema)


def model_precision(config: EvalConfig, device: str) -> str:
    """Return the precision to evaluate with, as training configs name it.

    Raises:
        UserError: an unknown run config.
    """
    trained = None if config.mc_config_name is None else search_config(config.mc_config_name).precision
    return "fp32" if device == "cpu" else config.precision or trained or "fp32"


def find_weights_file(config: EvalConfig) -> Path:
    """Return the file of the model's weights; those of an OpenCLIP tag are downloaded if needed.

    Raises:
        UserError: the file is not there, or the model is unknown.
    """
    model, pretrained = _source(config)
    if not Path(model).exists() and (unset := unset_variables(model)):
        raise UserError(f"model {model} is not there: the environment variable {unset[0]} is not set")
    if config.model is None and not Path(model).exists():
        train = f"llip train {config.mc_config_name}"
        raise UserError(f"checkpoint {model} is not there; train it with `{train}`, or set checkpoint_path in the YAML")
    return find_model_weights(model, pretrained)


def load_model(config: EvalConfig) -> Llip:
    """Load the model of an evaluation; a checkpoint must match the evaluation's run config.

    Raises:
        UserError: unreadable weights, or a model of another architecture (lists the differing fields).
    """
    model = llip.open_model(*_source(config), ema=config.ema)
    if config.mc_config_name is not None:
        check_model_matches(model, search_config(config.mc_config_name))
    return model


def _source(config: EvalConfig) -> tuple[str, str | None]:
    """Return what `llip.open_model` opens, with `~` and variables expanded."""
    if config.model is not None:
        pretrained = None if config.pretrained is None else expand_variables(config.pretrained)
        return expand_variables(config.model), pretrained
    assert config.checkpoint_path is not None, "a program requires it or `model`"
    return str(expand_path(config.checkpoint_path)), None
