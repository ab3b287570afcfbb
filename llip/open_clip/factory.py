"""From names to a model with its transforms and tokenizer, and from a checkpoint back to the same model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.architecture import list_models, resolve_architecture
from llip.open_clip.model import Llip
from llip.open_clip.pooling import create_pooling
from llip.open_clip.vision import MixtureTokenViT
from llip.open_clip.weights import find_weights, load_weights, read_checkpoint

IMAGE_MEAN, IMAGE_STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
CROP_SCALE = (0.9, 1.0)
"""Share of an image's area that a training crop keeps (OpenCLIP's default)."""

__all__ = [
    "CROP_SCALE",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "ModelSpec",
    "check_model_matches",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "image_transforms",
    "list_models",
    "load_pretrained",
    "model_spec",
    "normalise_images",
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

    def __post_init__(self) -> None:
        width = self.architecture["embed_dim"]
        if self.pooling == "text" and width % self.pool_heads:
            raise UserError(f"pool_heads = {self.pool_heads} does not divide the embedding width {width} of the model")

    @property
    def image_size(self) -> int:
        return self.architecture["vision_cfg"]["image_size"]

    @property
    def context_length(self) -> int:
        return self.architecture["text_cfg"]["context_length"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as checkpoints store them."""
        return dataclasses.asdict(self)


def model_spec(config: Config) -> ModelSpec:
    """Resolve the model fields of a run's config."""
    return ModelSpec(
        architecture=resolve_architecture(config.model, config.image_size, config.context_length, config.patch_dropout),
        mixture_tokens=config.mixture_tokens,
        pooling=config.pooling,
        pool_heads=config.pool_heads,
        softmax_temperature=config.softmax_temperature,
        loss=config.loss,
    )


def create_model(spec: ModelSpec, pretrained: str | None = None, model_name: str = "") -> Llip:
    """Build a model with fresh weights (drawn from torch's global generator), or with those of `pretrained`.

    Args:
        spec: what to build.
        pretrained: a checkpoint file, or an OpenCLIP tag for `model_name`.

    Raises:
        UserError: the weights are not there or do not fit.
    """
    towers = open_clip.CustomTextCLIP(**spec.architecture)
    width = spec.architecture["embed_dim"]
    pooling = create_pooling(spec.pooling, spec.mixture_tokens, width, spec.pool_heads, spec.softmax_temperature)
    model = Llip(MixtureTokenViT(towers.visual, spec.mixture_tokens), towers.text, pooling, spec.loss)
    model.config = spec.to_dict()
    if pretrained is not None:
        load_weights(model, read_checkpoint(find_weights(pretrained, model_name)), towers_only=True)
    return model


def get_tokenizer(model: str | None = None, context_length: int | None = None) -> SimpleTokenizer:
    """Return the tokenizer of `model`: called with a list of T texts, it returns token ids [T, context_length]."""
    if context_length is None:
        assert model is not None, "a model name or a context length is needed"
        context_length = resolve_architecture(model)["text_cfg"]["context_length"]
    return SimpleTokenizer(context_length=context_length)


def image_transforms(image_size: int) -> tuple[Callable, Callable]:
    """Return OpenCLIP's training and evaluation transforms: PIL image -> normalised float [3, size, size]."""
    common = {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    train = open_clip.image_transform(image_size, is_train=True, aug_cfg={"scale": CROP_SCALE}, **common)
    return train, open_clip.image_transform(image_size, is_train=False, **common)


def _attach(model: Llip, spec: ModelSpec) -> Llip:
    model.preprocess_train, model.preprocess_val = image_transforms(spec.image_size)
    model.tokenizer = get_tokenizer(context_length=spec.context_length)
    return model


def create_model_and_transforms(
    model: str,
    *,
    mixture_tokens: int = 1,
    pooling: str = "text",
    pool_heads: int = 8,
    softmax_temperature: float = 5.0,
    loss: str = "sigmoid",
    image_size: int | None = None,
    context_length: int | None = None,
    pretrained: str | None = None,
) -> tuple[Llip, Callable, Callable]:
    """Build a model and its image transforms.

    Args:
        model: an OpenCLIP ViT by name (`llip.list_models()`), or a path to a json in its format.
        mixture_tokens: K.
        pooling: first, mean, learned or text.
        pool_heads: M, for text-conditioned pooling.
        softmax_temperature: tau, for text-conditioned pooling.
        loss: the objective it will be trained with (sigmoid or softmax): where scale and bias start.
        image_size, context_length: replace the model's own.
        pretrained: a checkpoint file or an OpenCLIP tag.

    Returns:
        (model, preprocess_train, preprocess_val); the transforms map a PIL image to a normalised [3, size, size].

    Raises:
        UserError: an unknown name or value, or weights that are not there.
    """
    config = Config(  # the one place that checks names, types and ranges
        model=model,
        mixture_tokens=mixture_tokens,
        pooling=pooling,
        pool_heads=pool_heads,
        softmax_temperature=softmax_temperature,
        loss=loss,
        image_size=image_size,
        context_length=context_length,
    )
    spec = model_spec(config)
    built = _attach(create_model(spec, pretrained, model), spec)
    return built, built.preprocess_train, built.preprocess_val


def load_pretrained(path: str | Path) -> Llip:
    """Rebuild the model of a checkpoint that this project wrote, in eval mode.

    The model carries `.config` (a plain dict), `.preprocess_val` and `.tokenizer`.

    Raises:
        UserError: the file is not there, is damaged, or does not describe its model.
    """
    checkpoint = read_checkpoint(Path(path))
    if not isinstance(checkpoint.get("model"), dict):
        raise UserError(
            f"checkpoint {str(path)!r} does not describe its model (key 'model'); for foreign weights use "
            "llip.create_model_and_transforms(..., pretrained=PATH)"
        )
    spec = ModelSpec(**checkpoint["model"])
    model = create_model(spec)
    load_weights(model, checkpoint, source=str(path))
    return _attach(model, spec).eval()


def check_model_matches(model: Llip, config: Config) -> None:
    """Raise a `UserError` that lists the differing fields when `model` is not what `config` describes."""
    found, expected = dict(model.config), model_spec(config).to_dict()
    for fields in (found, expected):
        fields.update(fields.pop("architecture"))
        for part in ("vision_cfg", "text_cfg"):
            fields.update({f"{part}.{key}": value for key, value in fields.pop(part).items()})
        fields.pop("loss")  # decides where training starts, not what the model computes
        fields.pop("vision_cfg.patch_dropout")
        if fields["pooling"] != "text":
            fields.pop("pool_heads"), fields.pop("softmax_temperature")
    different = [
        f"{key}: {found.get(key)!r} in the checkpoint, {expected.get(key)!r} in config {config.name}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    if different:
        raise UserError("the checkpoint's model is not the config's: " + "; ".join(different))


def normalise_images(images: Tensor) -> Tensor:
    """Turn uint8 images [B, 3, H, W] into what the towers expect, on their device: the arithmetic of the transforms."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
