"""Pretrained weights of one part: a backbone of timm, or an encoder of Hugging Face, from files on this machine.

Loading is strict, but for what the part does not have by construction: the source's classifier, pooling or
language-model head, which are reported as left over.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants as hub
from torch import Tensor, nn

from llip.errors import UserError
from llip.open_clip.architecture import PartWeights
from llip.open_clip.model import Llip
from llip.open_clip.towers.backbone import BackboneTower, fit_trunk
from llip.open_clip.towers.text import HFTextTower, encoder_class, encoder_of, require_transformers
from llip.open_clip.weights.files import read_checkpoint, weights_in_folder
from llip.open_clip.weights.key_names import part, without_wrappers
from llip.open_clip.weights.report import LoadReport, join_reports

log = logging.getLogger(__name__)

_STATES = ("state_dict", "model")  # where timm's and others' training checkpoints keep the weights
_TRUNKS = ("visual.trunk.", "trunk.")  # of OpenCLIP's towers
_COUNTER = "num_batches_tracked"  # of BatchNorm; no value depends on it


def load_parts(model: Llip, weights: PartWeights) -> None:
    """Load the weights that a model's json names for its parts; `model.load_report` describes all of them.

    Raises:
        UserError: files that are missing, damaged or of another architecture.
    """
    reports = []
    if weights.image is not None:
        if not isinstance(model.visual, BackboneTower):
            raise UserError("vision_cfg.timm_weights: the model has no mixture_head; give its weights as pretrained=")
        reports.append(load_backbone(model.visual, weights.image))
    if weights.text is not None:
        assert isinstance(model.text, HFTextTower)
        reports.append(load_text_encoder(model.text, weights.text))
    if reports:
        model.load_report = join_reports(reports)


def load_backbone(tower: BackboneTower, path: Path) -> LoadReport:
    """Load a timm model's weights from a file, or a folder that holds one, as timm itself would.

    Names of other releases are translated and position embeddings are resized by timm's own function for the family.

    Raises:
        UserError: the file is missing, or does not fit the backbone.
    """
    trunk, name = tower.trunk, tower.trunk.pretrained_cfg["architecture"]
    checkpoint = read_checkpoint(weights_in_folder(path) if path.is_dir() else path)
    raw = next((checkpoint[key] for key in _STATES if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    state = without_wrappers({key: value for key, value in raw.items() if isinstance(value, Tensor)})
    state = next((found for prefix in _TRUNKS if (found := part(state, prefix))), state)
    try:
        left, notes = fit_trunk(trunk, state)
    except Exception as error:  # whatever the family's function meets in another model's weights
        raise UserError(f"timm_weights {str(path)!r} are not of timm's {name} ({error!r})") from error
    report = _load(trunk, state, f"timm_weights {str(path)!r}", "visual.trunk.", left, notes)
    tower.set_pixel_statistics(*tower.default_statistics())
    return report


def load_text_encoder(tower: HFTextTower, folder: Path) -> LoadReport:
    """Load an encoder's weights from its folder by `transformers`, without the network and without running its code.

    Raises:
        UserError: the folder holds no weights, or others than the encoder's.
    """
    source = f"text encoder {str(folder)!r}"
    transformers = require_transformers(source)
    config = tower.transformer.config
    try:
        with patch.object(hub, "HF_HUB_OFFLINE", True), _quiet(transformers.logging):
            loaded, info = encoder_class(config).from_pretrained(
                str(folder), output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever the library finds wrong with the folder
        raise UserError(
            f"{source} brings no weights ({type(error).__name__}: {error}); to start from fresh ones, set "
            "text_cfg.hf_model_pretrained to false"
        ) from error
    absent = {key.removeprefix("encoder.") for key in info["missing_keys"]} | set(info["missing_keys"])
    state = encoder_of(loaded, tower.pooler_type).state_dict()
    state = {key: value.float() for key, value in state.items() if key not in absent}
    return _load(tower.transformer, state, source, "text.transformer.", info["unexpected_keys"], [])


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Silence the library's report and progress bar: what is missing or left over is reported here."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _load(
    module: nn.Module, state: Mapping[str, Tensor], source: str, prefix: str, left: Iterable[str], notes: list[str]
) -> LoadReport:
    expected = module.state_dict()
    wrong = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    report = LoadReport(
        loaded=tuple(prefix + key for key in expected if key in state and key not in wrong),
        missing=tuple(prefix + key for key in expected if key not in state and not key.endswith(_COUNTER)),
        unexpected=tuple(prefix + key for key in state if key not in expected),
        reshaped=tuple((prefix + key, tuple(state[key].shape), tuple(expected[key].shape)) for key in wrong),
        notes=tuple(notes),
    )
    if problems := report.problems(report.missing, report.unexpected):
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(problems[:10])}{more}")
    module.load_state_dict(dict(state), strict=False)
    report = dataclasses.replace(report, unexpected=tuple(prefix + key for key in left))
    log.info(report.summary(source))
    return report
