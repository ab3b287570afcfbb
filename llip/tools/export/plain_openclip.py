"""A checkpoint that plain OpenCLIP loads, with identical features: for one mixture token, where Llip is CLIP.

With K = 1 the weights over mixture tokens are 1, and z = W_O (W_V h + b_V) up to its norm: a text-conditioned head is
then one matrix, which goes into the tower's projection.
"""

import copy
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from llip.open_clip.model import Llip
from llip.open_clip.pooling import TextConditionedPooling
from llip.open_clip.towers.backbone import BackboneTower
from llip.open_clip.towers.base import OPTIONAL_BUFFERS
from llip.open_clip.towers.text import HFTextTower
from llip.open_clip.towers.vit import MixtureTokenViT
from llip.open_clip.transforms import RESIZE_MODES
from llip.open_clip.weights.key_names import part
from llip.system.files import write_json
from llip.tools.export.folder import save_weights

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"

TOLERANCE = 1e-5
"""Largest difference between unit-norm features that counts as identical (float32 rounding)."""


def why_not(model: Llip) -> str | None:
    """Return why plain OpenCLIP cannot hold this model; None if it can."""
    tokens = model.visual.mixture_tokens
    if tokens > 1:
        return f"the image tower has {tokens} mixture tokens: OpenCLIP's has one class token and one feature per image"
    if isinstance(model.visual, BackboneTower):
        return "the image tower has a mixture head, which OpenCLIP does not have"
    if isinstance(model.text, HFTextTower):
        return "OpenCLIP reads the config of a Hugging Face text encoder from the encoder's own folder or the hub"
    if model.config["pair_tokens"] != "mixture" or model.config["pooling"] == "flair":
        return "its image features depend on the caption: OpenCLIP's model has one feature per image"
    if not isinstance(model.pooling, TextConditionedPooling):
        return None
    if not isinstance(model.visual, MixtureTokenViT):
        return "its text-conditioned head cannot be merged into the projection of a timm tower"
    if model.pooling.v_proj.bias is not None:
        return "its head has a bias, and the projection of OpenCLIP's tower has none"
    return None


def _folded_projection(model: Llip) -> Tensor:
    """Return the tower's projection [W, D] times (W_O W_V)^T."""
    assert isinstance(model.visual, MixtureTokenViT)
    assert isinstance(model.pooling, TextConditionedPooling)
    assert model.visual.proj is not None
    head = model.pooling.out_proj.weight.double() @ model.pooling.v_proj.weight.double()
    return (model.visual.proj.double() @ head.T).to(model.visual.proj.dtype)


def plain_state(model: Llip) -> dict[str, Tensor]:
    """Return the weights under OpenCLIP's names. `why_not(model)` must be None."""
    assert why_not(model) is None, why_not(model)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("pooling.")}
    for name in OPTIONAL_BUFFERS:
        state.pop(f"visual.{name}", None)
    if not isinstance(model.visual, MixtureTokenViT):
        return state
    if isinstance(model.pooling, TextConditionedPooling):
        state["visual.proj"] = _folded_projection(model)
    state["visual.class_embedding"] = state["visual.class_embedding"][0]
    text = part(state, "text.")
    return {key: value for key, value in state.items() if not key.startswith("text.")} | text


def plain_config(model: Llip) -> dict[str, Any]:
    """Return what OpenCLIP builds the model and its transform from."""
    architecture = copy.deepcopy(model.config["architecture"])
    resize_mode = architecture.pop("resize_mode", RESIZE_MODES[0])
    if architecture["text_cfg"].get("hf_tokenizer_name"):
        architecture["text_cfg"]["hf_tokenizer_name"] = "."  # relative to the folder that OpenCLIP opens
    if model.logit_bias is not None:
        architecture["init_logit_bias"] = -10
    if not isinstance(model.visual, MixtureTokenViT):
        architecture["custom_text"] = True
    mean, std = model.visual.pixel_statistics()
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": resize_mode}
    return {"model_cfg": architecture, "preprocess_cfg": preprocess}


def write_plain(folder: Path, model: Llip) -> float:
    """Write weights and config, load them with OpenCLIP, and return the largest difference of unit-norm features."""
    save_weights(folder / WEIGHTS, plain_state(model), "open_clip")
    write_json(folder / CONFIG, plain_config(model))
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    size = model.config["architecture"]["vision_cfg"]["image_size"]
    text = model.config["architecture"]["text_cfg"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator)
    tokens = torch.randint(1, text["vocab_size"], (2, text["context_length"]), generator=generator)
    with torch.no_grad():
        seen = model.visual.source_pixels(images)
        t = model.encode_text(tokens)
        z = model.contextualize(model.encode_image(images), t)[:, 0]
        apart = (z - theirs.encode_image(seen, normalize=True)).abs().max()
        apart = max(apart, (t - theirs.encode_text(tokens, normalize=True)).abs().max())
    assert apart < TOLERANCE, f"OpenCLIP's features differ by {apart:.1e} after the export"
    return float(apart)
