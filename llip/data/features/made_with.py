"""What frozen features depend on: the frozen part of a model, and how images and captions reach it.

Shapes: L features of an image, W their width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llip.configs import Config
from llip.data.features.cache import caption_sources, compare, open_cache, uses_text_features
from llip.data.features.format import FeatureDtype, FeatureFormat
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec
from llip.open_clip.model import Llip
from llip.open_clip.tokenizer import Tokenizer
from llip.open_clip.towers.backbone import BackboneTower
from llip.open_clip.towers.base import OPTIONAL_BUFFERS

_PROBE = ["A man (aged 30?) photographs 2 dogs, naïvely, at the café's door.", ""]
_TRUNK, _PROJECTION = "trunk.", ("text_projection", "proj.")
_NOT_IMAGE = ("timm_weights", "timm_model_pretrained", "patch_dropout")
"""Keys of `vision_cfg` on which frozen features do not depend: locked towers drop nothing."""
_NOT_TEXT = ("hf_model_name", "hf_model_pretrained", "hf_tokenizer_name", "hf_proj_type")
_HEAD_INPUTS = ("tokens", "grid")  # of `mixture_head`: what the head gets


def frozen_image_state(model: Llip) -> dict[str, Tensor]:
    """Return the weights and buffers that `visual.frozen_features` reads: below a `mixture_head`, or all."""
    state = model.visual.state_dict(keep_vars=True)
    if not isinstance(model.visual, BackboneTower):
        return state
    return {name: value for name, value in state.items() if name.startswith(_TRUNK) or name in OPTIONAL_BUFFERS}


def frozen_text_state(model: Llip) -> dict[str, Tensor]:
    """Return the weights and buffers that `frozen_text_features` reads: those below the projection."""
    state = model.text.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not name.startswith(_PROJECTION)}


def check_frozen(model: Llip, texts: bool) -> None:
    """Raise a `UserError` if training changes what frozen features depend on.

    Args:
        model: with the locks of its config.
        texts: whether features of captions are cached too.
    """
    parts = {"image": frozen_image_state(model)} | ({"text": frozen_text_state(model)} if texts else {})
    for part, state in parts.items():
        if trained := [name for name, value in state.items() if value.requires_grad]:
            raise UserError(
                f"frozen features: {len(trained)} tensors of the {part} tower are trained in spite of lock_{part}, "
                f"the first is {trained[0]!r}; several mixture tokens of a locked tower are trained: set "
                "mixture_tokens=1, or choose a model with a mixture_head and set lock_image=backbone"
            )


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(config: Config, spec: ModelSpec, model: Llip, tokenizer: Tokenizer, texts: bool) -> dict[str, Any]:
    """Return all that the features of a run depend on, as plain values.

    Args:
        config: the run.
        spec: its model.
        model: with the weights that the run starts from.
        tokenizer: of the model.
        texts: whether features of captions are cached too.
    """
    architecture = spec.architecture
    image = {key: value for key, value in architecture["vision_cfg"].items() if key not in _NOT_IMAGE}
    if isinstance(model.visual, BackboneTower):
        head = architecture["mixture_head"]
        image |= {f"mixture_head.{key}": head.get(key) for key in _HEAD_INPUTS}
    else:
        image |= {"embed_dim": architecture["embed_dim"], "quick_gelu": architecture["quick_gelu"]}
        image |= {"mixture_tokens": spec.mixture_tokens, "pair_tokens": spec.pair_tokens}
    image |= {"image_size": spec.image_size, "resize_mode": spec.resize_mode, "image_crop": config.image_crop}
    described = {**image, "captions": caption_sources(config)}  # the first difference is named: settings before digests
    if texts:
        text = {key: value for key, value in architecture["text_cfg"].items() if key not in _NOT_TEXT}
        described |= {f"text.{key}": value for key, value in text.items()}
    described["image weights"] = digest_tensors(frozen_image_state(model))
    if texts:
        described["text weights"] = digest_tensors(frozen_text_state(model))
        described["tokenizer"] = hashlib.blake2b(tokenizer(_PROBE).numpy().tobytes(), digest_size=16).hexdigest()
    return described


def check_made_with(config: Config, spec: ModelSpec, model: Llip, tokenizer: Tokenizer) -> None:
    """Compare what the features of a run's `feature_cache` were made with to what the run has now.

    Args:
        config: the run.
        spec: its model.
        model: with the weights that the run starts from and the locks of its config.
        tokenizer: of the model.

    Raises:
        UserError: they differ, or the run trains what was taken for frozen; names the first difference.
    """
    folder = Path(config.feature_cache or "")
    manifest = open_cache(folder)
    texts = uses_text_features(config, manifest.format)
    check_frozen(model, texts)
    compare(
        manifest.made_with,
        describe(config, spec, model, tokenizer, texts),
        f"feature cache {str(folder)!r} was made with another",
        "run `llip encode` with another --out, and set feature_cache to it",
    )


def text_width(spec: ModelSpec) -> int:
    """Return W of the frozen features of a caption."""
    text = spec.architecture["text_cfg"]
    return text["hf_config"]["hidden_size"] if "hf_config" in text else text["width"]


@torch.no_grad()
def feature_format(spec: ModelSpec, model: Llip, dtype: FeatureDtype, texts: bool) -> FeatureFormat:
    """Return the format of a model's features, from one blank image; `model` may be on the device `meta`.

    Args:
        spec: of the model.
        model: in eval mode.
        dtype: of the features.
        texts: whether features of captions are cached too.
    """
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, spec.image_size, spec.image_size, device=device)
    _, tokens, width = model.visual.frozen_features(images).shape
    return FeatureFormat(dtype, (tokens, width), text_width(spec) if texts else None)
