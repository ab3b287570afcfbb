"""From names to a model with its transforms and tokenizer, and from a checkpoint back to the same model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.timm_model import TimmModel

from llip.configs import ATTENTION_POOLINGS, Config
from llip.errors import UserError, did_you_mean
from llip.extensions import FOLDER, portable_name, relocate
from llip.open_clip.architecture import (
    build_towers,
    list_further_models,
    list_models,
    part_weights,
    resolve_architecture,
)
from llip.open_clip.model import Llip
from llip.open_clip.plain import find_plain_weights, is_plain_folder, open_plain
from llip.open_clip.pooling import create_pooling
from llip.open_clip.tokenizer import Tokenizer, create_tokenizer
from llip.open_clip.towers.backbone import BackboneTower, MixtureHeadConfig
from llip.open_clip.towers.base import MixtureTower
from llip.open_clip.towers.timm_vit import timm_tower
from llip.open_clip.towers.vit import MixtureTokenViT
from llip.open_clip.transforms import RESIZE_MODES, image_transforms
from llip.open_clip.weights.files import (
    WeightSource,
    find_weights,
    is_ours,
    read_checkpoint,
    read_json,
    weights_in_folder,
)
from llip.open_clip.weights.load import load_weights
from llip.open_clip.weights.parts import load_parts

__all__ = [
    "ModelSpec",
    "check_model_matches",
    "create_model",
    "create_model_and_transforms",
    "find_model_weights",
    "get_tokenizer",
    "list_further_models",
    "list_models",
    "load_pretrained",
    "model_spec",
    "open_model",
]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that decides what a model computes, apart from its weights. Stored in every checkpoint."""

    architecture: dict[str, Any]
    mixture_tokens: int
    pooling: str
    pool_heads: int
    softmax_temperature: float
    loss: str
    pair_tokens: str = "mixture"

    def __post_init__(self) -> None:
        width = self.architecture["embed_dim"]
        if self.pooling in ATTENTION_POOLINGS and width % self.pool_heads:
            raise UserError(f"pool_heads = {self.pool_heads} does not divide the embedding width {width} of the model")

    @property
    def image_size(self) -> int:
        return self.architecture["vision_cfg"]["image_size"]

    @property
    def resize_mode(self) -> str:
        return self.architecture.get("resize_mode", RESIZE_MODES[0])

    @property
    def context_length(self) -> int:
        return self.architecture["text_cfg"]["context_length"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as checkpoints store them."""
        return dataclasses.asdict(self)


def model_spec(config: Config) -> ModelSpec:
    """Resolve the model fields of a run's config."""
    return ModelSpec(
        architecture=resolve_architecture(
            config.model, config.image_size, config.context_length, config.patch_dropout, config.tokenizer
        ),
        mixture_tokens=config.mixture_tokens,
        pooling=config.pooling,
        pool_heads=config.pool_heads,
        softmax_temperature=config.softmax_temperature,
        loss=config.loss,
        pair_tokens=config.pair_tokens,
    )


def _create_tower(source: torch.nn.Module, spec: ModelSpec) -> MixtureTower:
    if not isinstance(source, TimmModel):
        return MixtureTokenViT(source, spec.mixture_tokens)
    if described := spec.architecture.get("mixture_head"):
        head, width = MixtureHeadConfig.from_json(described), spec.architecture["embed_dim"]
        return BackboneTower(source.trunk, head, spec.mixture_tokens, spec.image_size, width)
    patch = source.trunk.patch_embed.patch_size[0] if hasattr(source.trunk, "patch_embed") else 1
    if spec.image_size < patch:
        raise UserError(f"image_size {spec.image_size} is less than one patch of {patch} pixels")
    source.set_input_size(spec.image_size)  # the library builds every timm tower at timm's own size
    return timm_tower(source, spec.mixture_tokens)


def _start_from(model: Llip, source: WeightSource, name: str, strict: bool) -> None:
    checkpoint = read_checkpoint(source.path)
    model.load_report = load_weights(model, checkpoint, name, towers_only=True, strict=strict)
    statistics = source.pixels or model.visual.default_statistics()
    if statistics is not None and not is_ours(checkpoint):
        model.visual.set_pixel_statistics(*statistics)


def create_model(spec: ModelSpec, pretrained: str | None = None, model_name: str = "", strict: bool = True) -> Llip:
    """Build a model with fresh weights (drawn from torch's global generator), or with those of `pretrained`.

    Args:
        spec: what to build.
        pretrained: a checkpoint file, a folder of one, or an OpenCLIP tag for `model_name`.
        model_name: of the config; a json's parts start from the weights that it names for them. Empty: from none.
        strict: weights that do not fit are an error; otherwise they are reported and left out.

    Raises:
        UserError: the weights are not there or do not fit.
    """
    towers = build_towers(spec.architecture)
    width = spec.architecture["embed_dim"]
    pooling = create_pooling(spec.pooling, spec.mixture_tokens, width, spec.pool_heads, spec.softmax_temperature)
    tower = _create_tower(towers.visual, spec)
    if spec.pair_tokens != "mixture":
        tower.give_patches()
        pooling.first_pair_token = spec.mixture_tokens if spec.pair_tokens == "patches" else 0
    model = Llip(tower, towers.text, pooling, spec.loss)
    model.config = spec.to_dict()
    load_parts(model, part_weights(model_name))
    if pretrained is not None:
        _start_from(model, find_weights(pretrained, model_name), pretrained, strict)
    return model


def spec_tokenizer(spec: ModelSpec) -> Tokenizer:
    """Return the tokenizer of a model: called with a list of T texts, it returns token ids [T, context_length].

    Raises:
        UserError: the tokenizer's folder is not there or does not fit the model.
    """
    return create_tokenizer(spec.architecture["text_cfg"])


def get_tokenizer(
    model: str | None = None, context_length: int | None = None, tokenizer: str | None = None
) -> Tokenizer:
    """Return the tokenizer of `model`: called with a list of T texts, it returns token ids [T, context_length].

    Args:
        model: a name or a json; None: OpenCLIP's own tokenizer.
        context_length: replaces the model's own.
        tokenizer: folder of the tokenizer's files, for a model whose tokenizer does not ship with OpenCLIP.

    Raises:
        UserError: an unknown model, or a tokenizer that is not there.
    """
    if model is None:
        assert context_length is not None, "a model name or a context length is needed"
        return create_tokenizer({"context_length": context_length})
    return create_tokenizer(resolve_architecture(model, None, context_length, tokenizer=tokenizer)["text_cfg"])


def _attach(model: Llip, spec: ModelSpec) -> Llip:
    model.preprocess_train, model.preprocess_val = image_transforms(spec.image_size, spec.resize_mode)
    model.tokenizer = spec_tokenizer(spec)
    return model


def create_model_and_transforms(
    model: str,
    *,
    mixture_tokens: int = 1,
    pooling: str = "text",
    pair_tokens: Literal["mixture", "patches", "both"] = "mixture",
    pool_heads: int = 8,
    softmax_temperature: float = 5.0,
    loss: str = "sigmoid",
    image_size: int | None = None,
    context_length: int | None = None,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    strict: bool = True,
) -> tuple[Llip, Callable, Callable]:
    """Build a model and its image transforms.

    Args:
        model: an OpenCLIP ViT by name (`llip.list_models()`), one with an image tower from timm or
            another tokenizer (`llip.list_further_models()`), or a path to a json in OpenCLIP's format.
        mixture_tokens: K.
        pooling: first, mean, learned, text or flair.
        pair_tokens: what texts attend to: the mixture tokens, the tower's patch outputs, or both.
        pool_heads: M, for text-conditioned pooling.
        softmax_temperature: tau, for text pooling.
        loss: the objective it will be trained with (sigmoid or softmax): where scale and bias start.
        image_size, context_length: replace the model's own.
        pretrained: a checkpoint file, a folder of one, or an OpenCLIP tag.
        tokenizer: folder of the tokenizer's files, for a model whose tokenizer does not ship with OpenCLIP.
        strict: weights that do not fit are an error; otherwise they are reported and left out.

    Returns:
        (model, preprocess_train, preprocess_val); the transforms map a PIL image to a normalised [3, size, size]. With
        `pretrained`, `model.load_report` says what was loaded.

    Raises:
        UserError: an unknown name or value, or weights that are not there.
    """
    config = Config(  # the one place that checks names, types and ranges
        model=model,
        mixture_tokens=mixture_tokens,
        pooling=pooling,
        pair_tokens=pair_tokens,
        pool_heads=pool_heads,
        softmax_temperature=softmax_temperature,
        loss=loss,
        image_size=image_size,
        context_length=context_length,
        tokenizer=tokenizer,
    )
    spec = model_spec(config)
    built = _attach(create_model(spec, pretrained, model, strict), spec)
    return built, built.preprocess_train, built.preprocess_val


def _read_described(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return (description, checkpoint) of a checkpoint file, an exported folder, or the safetensors file in one."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix != ".safetensors":
        checkpoint = read_checkpoint(path)
        return checkpoint.get("model"), checkpoint
    checkpoint = read_checkpoint(weights_in_folder(path) if path.is_dir() else path)
    if not (folder / "config.json").is_file():
        return None, checkpoint
    described = read_json(folder / "config.json", "config").get("model")
    if isinstance(described, dict):
        text = described.get("architecture", {}).get("text_cfg", {})
        if text.get("hf_tokenizer_name"):  # an exported folder brings its own
            text["hf_tokenizer_name"] = str(folder / text["hf_tokenizer_name"])
    return described, checkpoint


def load_pretrained(path: str | Path, tokenizer: str | None = None, ema: bool = False) -> Llip:
    """Rebuild the model of a checkpoint that this project wrote, in eval mode.

    The model carries `.config` (a plain dict), `.preprocess_val` and `.tokenizer`.

    Args:
        path: a checkpoint file, a folder written by `llip export`, or the `model.safetensors` in one.
        tokenizer: folder of the tokenizer's files, if they have moved since the checkpoint was written.
        ema: load the moving average of the weights (`ema_decay`) instead.

    Raises:
        UserError: the file is missing or damaged, does not describe its model, or holds no average.
    """
    path = Path(path).expanduser()
    described, checkpoint = _read_described(path)
    if ema:
        if "ema_state_dict" not in checkpoint:
            raise UserError(f"checkpoint {str(path)!r} holds no average of its weights (config field ema_decay)")
        checkpoint = checkpoint["ema_state_dict"]
    fields = {field.name for field in dataclasses.fields(ModelSpec)}
    if not isinstance(described, dict) or not fields - {"pair_tokens"} <= described.keys() <= fields:
        raise UserError(
            f"checkpoint {str(path)!r} does not describe its model (key 'model', or config.json beside safetensors); "
            "for foreign weights use llip.create_model_and_transforms(..., pretrained=PATH)"
        )
    described |= relocate(described, _extensions_folder(path))
    spec = ModelSpec(**described)
    if tokenizer is not None:
        spec.architecture["text_cfg"]["hf_tokenizer_name"] = tokenizer
    model = create_model(spec)
    load_weights(model, checkpoint, source=str(path))
    return _attach(model, spec).eval()


def _extensions_folder(path: Path) -> Path:
    """Return where a checkpoint of a run, or an exported folder, keeps the files of its poolings and losses."""
    if path.is_dir() or path.suffix == ".safetensors":
        return (path if path.is_dir() else path.parent) / FOLDER
    return path.absolute().parent.parent / FOLDER


def open_model(
    model: str | Path, pretrained: str | None = None, *, tokenizer: str | None = None, ema: bool = False
) -> Llip:
    """Open any model in eval mode: what `load_pretrained` opens, and plain OpenCLIP models.

    Every model answers `encode_image` [B, K, D], `encode_text` [T, D], `similarity` [B, T], `contextualize` and
    `mixture_weights`, and carries `.config`, `.preprocess_val` and `.tokenizer`. A plain OpenCLIP model has one mixture
    token and `pooling` "first"; its scores are OpenCLIP's own. Its `visual` is a `plain.PlainImageTower`.

    Args:
        model: a checkpoint, an exported folder or its safetensors file; or an OpenCLIP model by name, or a folder with
            an `open_clip_config.json`.
        pretrained: weights of an OpenCLIP model given by name: a tag, a file or a folder. Otherwise None.
        tokenizer: folder of the tokenizer's files, if they have moved or do not ship with OpenCLIP.
        ema: load the moving average of the weights; for a checkpoint of this project.

    Raises:
        UserError: neither a path nor a name of OpenCLIP's, or weights that are missing, damaged or do not fit.
    """
    source = _find_source(model, pretrained)
    if isinstance(source, Path) and not is_plain_folder(source):
        return load_pretrained(source, tokenizer, ema)
    if ema:
        raise UserError(f"OpenCLIP model {str(source)!r} holds no average of its weights: leave out ema")
    return open_plain(str(source), pretrained, tokenizer)


def find_model_weights(model: str | Path, pretrained: str | None = None) -> Path:
    """Return the file of weights that `open_model` loads for these arguments; a tag's is downloaded if needed.

    Raises:
        UserError: neither a path nor a name of OpenCLIP's, or weights that are missing.
    """
    source = _find_source(model, pretrained)
    if isinstance(source, str):
        return find_plain_weights(source, pretrained).path
    if not source.exists():
        raise UserError(f"model {str(model)!r} is not there")
    return weights_in_folder(source) if source.is_dir() else source


def _find_source(model: str | Path, pretrained: str | None) -> Path | str:
    """Return the path of a model that brings its weights, or the name of an OpenCLIP model."""
    name = str(model).removeprefix("local-dir:")
    path = Path(name).expanduser()
    is_path = path.exists() or path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_path and pretrained is None:
        return path
    if name in open_clip.list_models():
        return name
    if is_path:
        raise UserError(f"model {name!r} brings its own weights: leave out pretrained = {pretrained!r}")
    raise UserError(
        f"model {name!r} is neither a path nor an OpenCLIP model.{did_you_mean(name, open_clip.list_models())}"
    )


def check_model_matches(model: Llip, config: Config) -> None:
    """Raise a `UserError` that lists the differing fields when `model` is not what `config` describes."""
    actual, expected = dict(model.config), model_spec(config).to_dict()
    for fields in (actual, expected):
        fields.update(fields.pop("architecture"))
        for part in ("vision_cfg", "text_cfg"):
            fields.update({f"{part}.{key}": value for key, value in fields.pop(part).items()})
        fields["pooling"] = portable_name(fields["pooling"])
        fields.pop("loss")  # decides where training starts, not what the model computes
        fields.pop("vision_cfg.patch_dropout", None)
        fields.pop("text_cfg.hf_tokenizer_name", None)  # where it lies on this machine
        fields.setdefault("pair_tokens", "mixture")
        if fields["pooling"] not in ATTENTION_POOLINGS:
            fields.pop("pool_heads")
        if fields["pooling"] != "text":
            fields.pop("softmax_temperature")
    different = [
        f"{key}: {actual.get(key)!r} in the checkpoint, {expected.get(key)!r} in config {config.name}"
        for key in sorted(actual.keys() | expected.keys())
        if actual.get(key) != expected.get(key)
    ]
    if different:
        raise UserError("the checkpoint's model is not the config's: " + "; ".join(different))
