"""Which towers there are: OpenCLIP's configs by name, ours beside this file, or a json in the same format.

A resolved architecture is the plain dict that OpenCLIP builds towers from. It is stored in every checkpoint, so that a
model can be rebuilt without the file it was described in.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from llip.errors import UserError, did_you_mean

_OURS = Path(__file__).parent / "model_configs"
_VOCABULARY = 49408  # of the BPE tokenizer that ships with OpenCLIP


def _refusal(architecture: dict[str, Any]) -> str | None:
    """Say why mixture tokens cannot go into this architecture, or None where they can."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if "multimodal_cfg" in architecture:
        return "it is a captioning model (CoCa)"
    if vision.get("timm_model_name"):
        return "its image tower comes from timm, not from OpenCLIP's own ViT"
    if isinstance(vision.get("layers"), list | tuple):
        return "its image tower is a ResNet, which has no tokens"
    if vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        return "its image tower does not pool by a class token"
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        return "its tokenizer must be downloaded"
    if text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        return f"its vocabulary ({text['vocab_size']}) is not that of OpenCLIP's tokenizer ({_VOCABULARY})"
    return None


@cache
def list_models() -> tuple[str, ...]:
    """Return the names of the architectures that mixture tokens can go into."""
    library = [name for name in open_clip.list_models() if _refusal(open_clip.get_model_config(name)) is None]
    return tuple(library + sorted(path.stem for path in _OURS.glob("*.json")))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"model config {str(path)!r} cannot be read as json: {error}") from error
    if not isinstance(architecture, dict):
        raise UserError(f"model config {str(path)!r}: expected an object, found {type(architecture).__name__}")
    return architecture.get("model_cfg", architecture)


def _check_keys(architecture: dict[str, Any], source: str) -> None:
    allowed = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg"}
    allowed |= {"init_logit_scale", "init_logit_bias"}  # our objectives bring their own
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in architecture:
            raise UserError(f"model {source}: {key!r} is missing; expected OpenCLIP's format")
    parts = {"": (architecture, allowed)}
    for key, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        parts[f"{key}."] = (architecture[key], {field.name for field in dataclasses.fields(kind)})
    for prefix, (values, names) in parts.items():
        if not isinstance(values, dict):
            raise UserError(f"model {source}: {prefix.rstrip('.')!r} is not an object")
        for key in values:
            if key not in names:
                raise UserError(f"model {source}: unknown key {prefix + key!r}.{did_you_mean(key, names)}")


def resolve_architecture(
    model: str, image_size: int | None = None, context_length: int | None = None, patch_dropout: float = 0.0
) -> dict[str, Any]:
    """Return what OpenCLIP builds the towers from.

    Args:
        model: a name from `list_models()`, or a path to a json in OpenCLIP's format.
        image_size, context_length: replace the model's own where given.
        patch_dropout: share of the patches dropped in training.

    Raises:
        UserError: an unknown name (with the nearest ones), an unreadable file, or a model that mixture tokens cannot go
            into, with the reason.
    """
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise UserError(f"model config {model!r} is not there; give a path to a json or a name from --help")
        architecture = _read_json(Path(model))
    elif (_OURS / f"{model}.json").is_file():
        architecture = _read_json(_OURS / f"{model}.json")
    else:
        architecture = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if architecture is None:
            raise UserError(f"unknown model {model!r}.{did_you_mean(model, list_models())}")
    _check_keys(architecture, repr(model))
    reason = _refusal(architecture)
    if reason is not None:
        raise UserError(f"model {model!r} cannot carry mixture tokens: {reason}.{did_you_mean(model, list_models())}")
    vision, text = dict(architecture["vision_cfg"]), dict(architecture["text_cfg"])
    if image_size is not None:
        vision["image_size"] = image_size
    if context_length is not None:
        text["context_length"] = context_length
    vision["patch_dropout"] = patch_dropout
    text.setdefault("context_length", CLIPTextCfg.context_length)
    vision.setdefault("image_size", CLIPVisionCfg.image_size)
    if vision["image_size"] % vision["patch_size"]:
        raise UserError(
            f"image_size {vision['image_size']} is not a multiple of the patch size {vision['patch_size']} of {model!r}"
        )
    quick_gelu = bool(architecture.get("quick_gelu", False))
    return {
        "embed_dim": architecture["embed_dim"],
        "quick_gelu": quick_gelu,
        "vision_cfg": vision,
        "text_cfg": text,
    }
