"""Text encoders of Hugging Face, and every text tower in two steps: the encoder with its pool, then the projection.

OpenCLIP's `HFTextEncoder` knows five families and reads its folder whenever it is built. The tower here has the same
poolers, projections and names of weights, takes any encoder that `transformers` has, and is built from its config
alone, which a checkpoint carries.

Shapes: T texts, C context length, W width of the encoder, D width of the embedding.
"""

from types import ModuleType
from typing import Any

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, MeanPooler
from torch import Tensor, nn

from llip.errors import UserError

POOLERS = {
    "mean_pooler": MeanPooler,
    "cls_pooler": ClsPooler,
    "cls_last_hidden_state_pooler": ClsLastHiddenStatePooler,
}
PROJECTIONS = ("linear", "mlp")


def require_transformers(needed_by: str) -> ModuleType:
    """Return the package `transformers`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{needed_by} needs the package transformers: pip install 'llip[transformers]'") from error
    return transformers


def encoder_config(described: dict[str, Any]) -> Any:
    """Return the `transformers` config that a `config.json` describes.

    Raises:
        UserError: the package is missing, or does not have such a model.
    """
    transformers = require_transformers("text_cfg.hf_model_name")
    kind = described.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"text_cfg.hf_model_name: model_type {kind!r} is not in transformers {transformers.__version__}; a newer "
            "one may have it (code that comes with a model is never run)"
        )
    return transformers.CONFIG_MAPPING[kind].from_dict(described)


def encoder_class(config: Any) -> Any:
    """Return the automatic class that builds the encoder: without the decoder of T5 and the like, where it can."""
    transformers = require_transformers("text_cfg.hf_model_name")
    encodes_text = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if encodes_text else transformers.AutoModel


def encoder_of(model: Any, pooler: str) -> nn.Module:
    """Return the part of a `transformers` model that maps token ids to hidden states, without unused parameters."""
    transformers = require_transformers("text_cfg.hf_model_name")
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, transformers.PreTrainedModel):  # of an encoder and a decoder
        model = encoder
    if pooler != "cls_pooler" and hasattr(model, "pooler"):
        model.pooler = None
    return model


class HFTextTower(nn.Module):
    """An encoder of `transformers`, its pool, and the projection to the embedding."""

    context_length = None  # checked once, when the architecture is resolved

    def __init__(self, text_cfg: dict[str, Any], embed_dim: int) -> None:
        """Draw fresh weights.

        Args:
            text_cfg: of a resolved architecture, with `hf_config`.
            embed_dim: D.

        Raises:
            UserError: `transformers` is missing or does not have the encoder.
        """
        super().__init__()
        config = encoder_config(text_cfg["hf_config"])
        self.pad_token_id: int = config.pad_token_id
        self.pooler_type: str = text_cfg["hf_pooler_type"]
        self.transformer: Any = encoder_of(encoder_class(config).from_config(config), self.pooler_type)
        self.pooler = POOLERS[self.pooler_type]()
        width, hidden = config.hidden_size, (config.hidden_size + embed_dim) // 2
        if text_cfg["hf_proj_type"] == "mlp":
            self.proj: nn.Module = nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
            )
        else:
            self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [T, C], or features [T, W] from `frozen_features`, to text features [T, D]."""
        return self.proj(tokens if tokens.is_floating_point() else self.frozen_features(tokens))

    def frozen_features(self, tokens: Tensor) -> Tensor:
        """Return the pooled hidden states [T, W] of token ids [T, C]."""
        if tokens.device.type == "meta":  # the encoder would look into the mask
            outputs = self.transformer(input_ids=tokens)
            return self.pooler(outputs, torch.ones_like(tokens))
        mask = tokens != self.pad_token_id
        if not torch.compiler.is_compiling():  # drop columns of padding alone
            longest = int(mask.any(0).nonzero().max()) + 1
            tokens, mask = tokens[:, :longest], mask[:, :longest]
        return self.pooler(self.transformer(input_ids=tokens, attention_mask=mask.long()), mask.long())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        if enable:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()


def frozen_text_features(tower: Any, tokens: Tensor) -> Tensor:
    """Return the pooled features [T, W] of token ids [T, C], before the projection: see `lock_text=encoder`."""
    if isinstance(tower, HFTextTower):
        return tower.frozen_features(tokens)
    projection, tower.text_projection = tower.text_projection, None
    try:
        return tower(tokens)
    finally:
        tower.text_projection = projection


def text_from_features(tower: Any, features: Tensor) -> Tensor:
    """Return the text features [T, D] (not normalised) of `frozen_text_features` [T, W]."""
    if isinstance(tower, HFTextTower):
        return tower(features)  # through `forward`, where FSDP and torch.compile have their hooks
    projection = tower.text_projection
    if projection is None:
        return features
    return features @ projection if isinstance(projection, Tensor) else projection(features)
