"""Any plain OpenCLIP model behind Llip's interface: one mixture token per image, pooling=first, OpenCLIP's own scores.

Shapes: B images, T texts, D embedding width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from llip.errors import UserError
from llip.open_clip.architecture import evaluation_resize_mode, is_image_text
from llip.open_clip.model import Llip
from llip.open_clip.pooling import FirstToken
from llip.open_clip.tokenizer import Tokenizer, create_tokenizer
from llip.open_clip.towers.base import MixtureTower
from llip.open_clip.transforms import ImageTransform
from llip.open_clip.weights.files import LIBRARY, WeightSource, find_weights, read_json

CONFIG = "open_clip_config.json"
"""What makes a folder an OpenCLIP model: architecture and preprocessing, beside the weights."""

_MESSAGE_LENGTH = 500  # of OpenCLIP's errors, which may list every tensor


class PlainImageTower(MixtureTower):
    """The image side of an OpenCLIP model, of any kind: its feature is the one mixture token."""

    mixture_tokens = 1
    takes_any_size = True  # some do
    source: Any  # OpenCLIP's CLIP, CustomTextCLIP or CoCa

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        size = source.visual.preprocess_cfg["size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        patches = getattr(getattr(source.visual, "trunk", None), "patch_embed", None)
        grid: Any = getattr(source.visual, "grid_size", None) or getattr(patches, "grid_size", None)
        self.grid_size = tuple(grid or (0, 0))  # (0, 0): a tower without a grid of patches

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to one mixture token each [B, 1, D] (not normalised)."""
        return self.source.encode_image(images, normalize=False)[:, None]


class _PlainTextTower(nn.Module):
    """The text side. It shares the model with the image side: OpenCLIP's `CLIP` does not hold its text tower apart."""

    source: Any

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [T, context] to features [T, D] (not normalised)."""
        return self.source.encode_text(tokens, normalize=False)


def is_plain_folder(path: Path) -> bool:
    """Return whether a folder holds an OpenCLIP model; an export of this project may hold one beside its own."""
    if not (path / CONFIG).is_file():
        return False
    exported = path / "config.json"
    return not (exported.is_file() and read_json(exported, "config").get("library_name") == LIBRARY)


def open_plain(name: str, pretrained: str | None, tokenizer: str | None = None) -> Llip:
    """Build an OpenCLIP model with its weights, in eval mode; images and texts score as OpenCLIP scores them.

    Args:
        name: an OpenCLIP model, or a folder with an `open_clip_config.json` and its weights.
        pretrained: a tag of that model, or a file or folder of weights; None with a folder.
        tokenizer: folder of the tokenizer's files, for a model whose tokenizer does not ship with OpenCLIP.

    Raises:
        UserError: no such model or weights, or OpenCLIP cannot build or load it.
    """
    preprocessing: dict[str, Any] = {}
    if Path(name).is_dir():
        name = f"local-dir:{name}"
        if pretrained is not None:
            raise UserError(f"pretrained = {pretrained!r}: {name} brings its own weights; leave it out")
    else:
        if not is_image_text(open_clip.get_model_config(name)):
            raise UserError(f"OpenCLIP model {name!r} is not a model of images and texts")
        source, tags = find_plain_weights(name, pretrained), open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:  # a bare file does not describe its preprocessing
            pretrained = str(source.path)
            preprocessing["image_resize_mode"] = evaluation_resize_mode(name)
            if source.pixels is not None:
                preprocessing |= {"image_mean": source.pixels.mean, "image_std": source.pixels.std}
    source_tokenizer = _tokenizer(name, tokenizer)  # the cheaper of the two to fail
    return _as_llip(name, source_tokenizer, *_build(name, pretrained, preprocessing))


def find_plain_weights(name: str, pretrained: str | None) -> WeightSource:
    """Return the weights of an OpenCLIP model by name; those of a tag are downloaded if needed.

    Raises:
        UserError: they are not there, or none are named.
    """
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f" (OpenCLIP's tags: {', '.join(tags)})" if tags else ""
        raise UserError(f"OpenCLIP model {name!r} needs weights: give pretrained, a tag or a path{known}")
    return find_weights(pretrained, name)


def _build(name: str, pretrained: str | None, preprocessing: dict[str, Any]) -> tuple[Any, Callable, Callable]:
    try:
        return open_clip.create_model_and_transforms(name, pretrained, **preprocessing)
    except Exception as error:  # whatever the library, timm or the hub finds wrong
        raise UserError(f"OpenCLIP cannot open {name!r}: {_shorten(error)}") from error


def _tokenizer(name: str, folder: str | None) -> Tokenizer:
    if folder is not None:
        return create_tokenizer({"context_length": 77, **open_clip.get_model_config(name)["text_cfg"]}, folder)
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        raise UserError(
            f"the tokenizer of {name!r} cannot be loaded: {_shorten(error)}. Save its files to a folder and give that: "
            "tokenizer=FOLDER"
        ) from error


def _shorten(error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    return reason if len(reason) <= _MESSAGE_LENGTH else reason[:_MESSAGE_LENGTH] + " ..."


def _as_llip(name: str, tokenizer: Tokenizer, source: Any, train: Callable, val: Callable) -> Llip:
    loss = "softmax" if source.logit_bias is None else "sigmoid"
    model = Llip(PlainImageTower(source), _PlainTextTower(source), FirstToken(1), loss)
    model.logit_scale.data.copy_(source.logit_scale.data.reshape(()))
    if model.logit_bias is not None:
        model.logit_bias.data.copy_(source.logit_bias.data.reshape(()))
    architecture = open_clip.get_model_config(name)
    architecture["resize_mode"] = source.visual.preprocess_cfg["resize_mode"]
    model.config = {
        "architecture": architecture, "mixture_tokens": 1, "pooling": "first", "pool_heads": 1,
        "softmax_temperature": 1.0, "loss": loss, "pair_tokens": "mixture",
    }  # fmt: skip
    model.tokenizer = tokenizer
    model.preprocess_train, model.preprocess_val = ImageTransform(train), ImageTransform(val)
    return model.eval()
