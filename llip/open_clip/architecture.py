"""Which towers there are: OpenCLIP's configs by name, ours beside this file, or a json in the same format.

A resolved architecture is the plain dict that OpenCLIP builds towers from. It is stored in every checkpoint, so that a
model can be rebuilt without the file it was described in.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from llip.errors import UserError, did_you_mean
from llip.open_clip.towers.backbone import MixtureHeadConfig
from llip.open_clip.towers.text import POOLERS, PROJECTIONS, HFTextTower, encoder_config
from llip.open_clip.transforms import RESIZE_MODES
from llip.open_clip.weights.files import read_json
from llip.system.paths import expand_path

_PATHS = (("vision_cfg", "timm_weights"), ("text_cfg", "hf_model_name"))
_OURS = Path(__file__).parent / "model_configs"

_TIMM_MODULES = tuple(f"timm.models.{name}" for name in ("vision_transformer", "vision_transformer_hybrid", "eva"))
_SMALLEST_TEXT = {"context_length": 1, "vocab_size": 2, "width": 1, "heads": 1, "layers": 1}
"""OpenCLIP builds both towers at once; this one gives way to an encoder of Hugging Face."""
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "auto_map")
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "xmod", "data2vec-text")
_VOCABULARY = 49408  # of the BPE tokenizer that ships with OpenCLIP


def _timm_refusal(vision: dict[str, Any], has_head: bool) -> str | None:
    """Return why this timm image tower cannot have mixture tokens, None where nothing in its config forbids them."""
    name, pool = vision["timm_model_name"], vision.get("timm_pool", CLIPVisionCfg.timm_pool)
    if not timm.is_model(name):
        return f"timm has no model {name!r} for its image tower{did_you_mean(name, timm.list_models())}"
    if has_head:
        return None
    module = timm.model_entrypoint(name).__module__
    if module not in _TIMM_MODULES:
        return (
            f"its image tower, timm's {name}, is neither a plain vision transformer nor an EVA ({module}); it has no "
            "mixture_head"
        )
    if pool not in ("token", "map"):
        return (
            f"its image tower from timm pools by {pool!r}, neither by class token nor by attention pool, and it has no "
            "mixture_head"
        )
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
    if text.get("hf_model_name") and not Path(text["hf_model_name"]).is_dir():
        return (
            f"its text encoder {text['hf_model_name']!r} is no folder on this machine; `hf download NAME --local-dir "
            "FOLDER` writes one, which a json names as text_cfg.hf_model_name"
        )
    is_ours = not (text.get("hf_tokenizer_name") or text.get("hf_model_name"))
    if is_ours and text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        return f"its vocabulary ({text['vocab_size']}) is not that of OpenCLIP's tokenizer ({_VOCABULARY})"
    if vision.get("timm_model_name"):
        return _timm_refusal(vision, "mixture_head" in architecture)
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
    allowed = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg", "mixture_head"}
    allowed |= {"init_logit_scale", "init_logit_bias"}  # our objectives bring their own
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in architecture:
            raise UserError(f"model {source}: {key!r} is missing; expected OpenCLIP's format")
    parts = {"": (architecture, allowed)}
    for key, kind, ours in (("vision_cfg", CLIPVisionCfg, {"timm_weights"}), ("text_cfg", CLIPTextCfg, set())):
        parts[f"{key}."] = (architecture[key], {field.name for field in dataclasses.fields(kind)} | ours)
    for prefix, (values, names) in parts.items():
        if not isinstance(values, dict):
            raise UserError(f"model {source}: {prefix.rstrip('.')!r} is not an object")
        for key in values:
            if key not in names:
                raise UserError(f"model {source}: unknown key {prefix + key!r}.{did_you_mean(key, names)}")
    for key, name in _PATHS:
        if (value := architecture[key].get(name)) is not None:
            architecture[key][name] = str(expand_path(value, path.absolute().parent))
    return architecture


class PartWeights(NamedTuple):
    """Files that a model's json names for one tower each, None: fresh weights."""

    image: Path | None = None  # a backbone of timm
    text: Path | None = None  # folder of a Hugging Face encoder


def part_weights(model: str) -> PartWeights:
    """Return the weights that the parts of `model`, a json, start from; of a name there are none."""
    if not model.endswith(".json"):
        return PartWeights()
    architecture = _find(model)
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    image = vision.get("timm_weights")
    encoder = text.get("hf_model_name") if text.get("hf_model_pretrained", True) else None
    return PartWeights(image and Path(image), encoder and Path(encoder))


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


def _with_hf_encoder(text: dict[str, Any], tokenizer: str | None, model: str) -> None:
    """Replace the encoder's folder in `text` by its config, in place; its tokenizer is in the same folder."""
    folder = Path(text.pop("hf_model_name"))
    text.pop("hf_model_pretrained", None)
    described = read_json(folder / "config.json", "text encoder's config")
    text["hf_config"] = {key: value for key, value in described.items() if key not in _NOT_ARCHITECTURE}
    text["hf_tokenizer_name"] = tokenizer or str(folder)
    for key, choices in (("hf_pooler_type", tuple(POOLERS)), ("hf_proj_type", PROJECTIONS)):
        value = text.setdefault(key, getattr(CLIPTextCfg, key))
        if value not in choices:
            raise UserError(f"model {model!r}: text_cfg.{key} = {value!r}; one of {', '.join(choices)}")
    config = encoder_config(text["hf_config"])
    if getattr(config, "pad_token_id", None) is None:
        raise UserError(f"model {model!r}: the config of text encoder {str(folder)!r} has no pad_token_id; add it")
    text["vocab_size"] = config.vocab_size
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in _POSITIONS_AFTER_PADDING:
        longest -= config.pad_token_id + 1
    if longest and text["context_length"] > longest:
        raise UserError(
            f"context_length {text['context_length']}: the text encoder of {model!r} has {longest} positions; set "
            f"context_length={longest} or less"
        )


def _mixture_head(described: Any, vision: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the checked mixture head, and set the backbone to unpooled features, in place."""
    try:
        head = dataclasses.asdict(MixtureHeadConfig.from_json(described))
    except UserError as error:
        raise UserError(f"model {model!r}: {error}") from error
    if not vision.get("timm_model_name"):
        raise UserError(f"model {model!r}: mixture_head needs a backbone of timm: vision_cfg.timm_model_name")
    if vision["patch_dropout"]:
        raise UserError(f"patch_dropout = {vision['patch_dropout']} with a mixture_head; set patch_dropout=0")
    vision |= {"timm_pool": "", "timm_proj": "none"}
    return head


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
    vision.pop("timm_weights", None)
    text.setdefault("context_length", CLIPTextCfg.context_length)
    if text.get("hf_model_name"):
        _with_hf_encoder(text, tokenizer, model)
    else:
        _with_tokenizer(text, tokenizer, model)
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
    if "mixture_head" in architecture:
        resolved["mixture_head"] = _mixture_head(architecture["mixture_head"], vision, model)
    if (mode := evaluation_resize_mode(model)) != RESIZE_MODES[0]:
        resolved["resize_mode"] = mode
    return resolved


class Towers(NamedTuple):
    """The library's two towers, the image tower still without mixture tokens."""

    visual: Any
    text: Any


def build_towers(architecture: dict[str, Any]) -> Towers:
    """Return the two towers of a resolved architecture, with fresh weights."""
    options = {key: architecture[key] for key in ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")}
    has_hf_encoder = "hf_config" in options["text_cfg"]
    if has_hf_encoder:
        options["text_cfg"] = _SMALLEST_TEXT
    try:
        towers = open_clip.CustomTextCLIP(**options)
    except Exception as error:
        if "mixture_head" not in architecture:
            raise
        name = architecture["vision_cfg"]["timm_model_name"]
        raise UserError(f"timm's {name} gives no unpooled features ({type(error).__name__}: {error})") from error
    text = HFTextTower(architecture["text_cfg"], architecture["embed_dim"]) if has_hf_encoder else towers.text
    return Towers(towers.visual, text)
