"""Which towers there are: OpenCLIP's configs by name, ours beside this file, or a json in the same format.

A resolved architecture is the plain dict that OpenCLIP builds towers from. It is stored in every checkpoint, so that a
model can be rebuilt without the file it was described in.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from llip.errors import UserError, did_you_mean
from llip.open_clip.transforms import RESIZE_MODES
from llip.open_clip.weights.files import read_json

_OURS = Path(__file__).parent / "model_configs"

_TIMM_MODULES = tuple(f"timm.models.{name}" for name in ("vision_transformer", "vision_transformer_hybrid", "eva"))
_VOCABULARY = 49408  # of the BPE tokenizer that ships with OpenCLIP


def _timm_refusal(vision: dict[str, Any]) -> str | None:
    """Return why this timm image tower cannot have mixture tokens, None where nothing in its config forbids them."""
    name, pool = vision["timm_model_name"], vision.get("timm_pool", CLIPVisionCfg.timm_pool)
    if not timm.is_model(name):
        return f"timm has no model {name!r} for its image tower"
    module = timm.model_entrypoint(name).__module__
    if module not in _TIMM_MODULES:
        return f"its image tower, timm's {name}, is neither a plain vision transformer nor an EVA ({module})"
    if pool not in ("token", "map"):
        return f"its image tower from timm pools by {pool!r}, neither by class token nor by attention pool"
    return None


def is_image_text(architecture: dict[str, Any]) -> bool:
    """Return whether a config of OpenCLIP's describes an image and a text tower; its audio models have no image."""
    return {"vision_cfg", "text_cfg"} <= architecture.keys()


def _refusal(architecture: dict[str, Any]) -> str | None:
    """Return why this architecture cannot have mixture tokens, None where it can."""
    if not is_image_text(architecture):
        return "it is not a model of images and texts"
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    if "multimodal_cfg" in architecture:
        return "it is a captioning model (CoCa)"
    if text.get("hf_model_name"):
        return "its text tower and tokenizer come from the Hugging Face hub"
    if not text.get("hf_tokenizer_name") and text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        return f"its vocabulary ({text['vocab_size']}) is not that of OpenCLIP's tokenizer ({_VOCABULARY})"
    if vision.get("timm_model_name"):
        return _timm_refusal(vision)
    if isinstance(vision.get("layers"), list | tuple):
        return "its image tower is a ResNet, which has no tokens"
    if vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        return "its image tower does not pool by a class token"
    return None


def _is_self_contained(architecture: dict[str, Any]) -> bool:
    return not (architecture["vision_cfg"].get("timm_model_name") or architecture["text_cfg"].get("hf_tokenizer_name"))


def _library_models(self_contained: bool) -> list[str]:
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    usable = {name: config for name, config in configs.items() if _refusal(config) is None}
    return [name for name, config in usable.items() if _is_self_contained(config) == self_contained]


@cache
def list_models() -> tuple[str, ...]:
    """Return the names of the architectures that are all OpenCLIP's: its class-token ViT and its tokenizer."""
    return (*_library_models(True), *sorted(path.stem for path in _OURS.glob("*.json")))


@cache
def list_further_models() -> tuple[str, ...]:
    """Return the other names that can have mixture tokens: an image tower from timm, or a tokenizer to bring."""
    return tuple(_library_models(False))


def _read_json(path: Path) -> dict[str, Any]:
    """Read a model's json, in OpenCLIP's format."""
    described = read_json(path, "model config")
    architecture, source = described.get("model_cfg", described), repr(str(path))
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
    return architecture


def _find(model: str) -> dict[str, Any]:
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise UserError(f"model config {model!r} is not there; give a path to a json or a name from --help")
        return _read_json(Path(model))
    if (_OURS / f"{model}.json").is_file():
        return _read_json(_OURS / f"{model}.json")
    if model in open_clip.list_models():
        return open_clip.get_model_config(model)
    raise UserError(f"unknown model {model!r}.{did_you_mean(model, list_models() + list_further_models())}")


def evaluation_resize_mode(model: str) -> str:
    """Return how evaluation images get their size, as the weights of `model` expect: see `RESIZE_MODES`."""
    if model.endswith(".json"):
        mode = read_json(Path(model), "model config").get("preprocess_cfg", {}).get("resize_mode", "shortest")
        if mode not in RESIZE_MODES:
            raise UserError(f"model {model!r}: preprocess_cfg.resize_mode = {mode!r}; one of {', '.join(RESIZE_MODES)}")
        return mode
    tags = open_clip.list_pretrained_tags_by_model(model)
    modes = {open_clip.get_pretrained_cfg(model, tag).get("resize_mode", "shortest") for tag in tags}
    return modes.pop() if len(modes) == 1 and modes <= set(RESIZE_MODES) else "shortest"


def _with_tokenizer(text: dict[str, Any], tokenizer: str | None, model: str) -> None:
    """Put the tokenizer's folder into `text`, in place."""
    needed = text.get("hf_tokenizer_name")
    if tokenizer is not None and needed is None:
        raise UserError(f"tokenizer = {tokenizer!r}: model {model!r} has OpenCLIP's own tokenizer; leave it out")
    if tokenizer is not None:
        text["hf_tokenizer_name"] = tokenizer
    elif needed is not None and not Path(needed).expanduser().is_dir():
        raise UserError(
            f"model {model!r}: its tokenizer {needed!r} does not ship with OpenCLIP; save it to a folder on this "
            "machine and give that: tokenizer=FOLDER"
        )


def resolve_architecture(
    model: str,
    image_size: int | None = None,
    context_length: int | None = None,
    patch_dropout: float = 0.0,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Return what OpenCLIP builds the towers from.

    Args:
        model: a name from `list_models()` or `list_further_models()`, or a path to a json in OpenCLIP's format.
        image_size, context_length: replace the model's own where given.
        patch_dropout: share of the patches dropped in training.
        tokenizer: folder of the tokenizer's files, for a model whose tokenizer does not ship with OpenCLIP.

    Raises:
        UserError: an unknown name (with the nearest ones), an unreadable file, a model that mixture tokens cannot go
            into, with the reason, or one whose tokenizer is not on this machine.
    """
    architecture = _find(model)
    reason = _refusal(architecture)
    if reason is not None:
        raise UserError(f"model {model!r} cannot carry mixture tokens: {reason}.{did_you_mean(model, list_models())}")
    vision, text = dict(architecture["vision_cfg"]), dict(architecture["text_cfg"])
    if image_size is not None:
        vision["image_size"] = image_size
    if context_length is not None:
        text["context_length"] = context_length
    vision["patch_dropout"] = patch_dropout
    vision.pop("timm_model_pretrained", None)  # weights come through `pretrained`, never by a download of timm's
    _with_tokenizer(text, tokenizer, model)
    text.setdefault("context_length", CLIPTextCfg.context_length)
    vision.setdefault("image_size", CLIPVisionCfg.image_size)
    if "patch_size" in vision and vision["image_size"] % vision["patch_size"]:
        raise UserError(
            f"image_size {vision['image_size']} is not a multiple of the patch size {vision['patch_size']} of {model!r}"
        )
    resolved = {
        "embed_dim": architecture["embed_dim"],
        "quick_gelu": bool(architecture.get("quick_gelu", False)),
        "vision_cfg": vision,
        "text_cfg": text,
    }
    if (mode := evaluation_resize_mode(model)) != RESIZE_MODES[0]:
        resolved["resize_mode"] = mode
    return resolved


def build_towers(architecture: dict[str, Any]) -> open_clip.CustomTextCLIP:
    """Return OpenCLIP's two towers of a resolved architecture, with fresh weights."""
    return open_clip.CustomTextCLIP(**{key: value for key, value in architecture.items() if key != "resize_mode"})
