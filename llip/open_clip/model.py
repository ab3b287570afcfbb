"""Llip: two OpenCLIP towers, a pooling, and the learned scale and bias of the logits.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from llip.extensions import find_extension
from llip.open_clip.inputs import check_cached, check_features, check_images, check_tokens
from llip.open_clip.objectives.objective import Objective
from llip.open_clip.pooling import Pooling, unit_norm
from llip.open_clip.scores.gram import full_precision
from llip.open_clip.tokenizer import Tokenizer
from llip.open_clip.towers.base import MixtureTower
from llip.open_clip.towers.text import text_from_features
from llip.open_clip.transforms import IMAGE_MEAN, IMAGE_STD, ImageTransform
from llip.open_clip.weights.report import LoadReport

MAX_LOGIT_SCALE = math.log(100)
"""Ceiling of `logit_scale` (Radford et al. 2021)."""


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of the towers' matrix products under a config's `precision`, None for float32."""
    return {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}[precision]


class Llip(nn.Module):
    """An image-text model whose image features may depend on the text they are compared with."""

    visual: MixtureTower
    text: Any  # OpenCLIP's text tower
    pooling: Pooling
    logit_bias: nn.Parameter | None
    image_mean: Tensor
    image_std: Tensor
    config: dict[str, Any]
    """Everything that decides what the model computes, apart from its weights: `factory.ModelSpec`."""
    load_report: LoadReport
    """What became of `pretrained`; set by `create_model`."""
    preprocess_train: ImageTransform
    preprocess_val: ImageTransform
    tokenizer: Tokenizer

    def __init__(self, visual: MixtureTower, text: nn.Module, pooling: Pooling, loss: str) -> None:
        """Put the parts together.

        Args:
            visual: maps images to mixture tokens [B, K, D].
            text: maps token ids to text features [T, D].
            pooling: one of `llip.open_clip.pooling`.
            loss: the objective it is trained with: sets where scale and bias start, and whether there is a bias.
        """
        super().__init__()
        self.visual, self.text, self.pooling = visual, text, pooling
        for name, values in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        objective: Objective = find_extension("loss", loss)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(objective.scale)))
        self.logit_bias = None if objective.bias is None else nn.Parameter(torch.tensor(objective.bias))

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images [B, 3, H, W] into what `encode_image` takes, with the arithmetic of the transforms."""
        return images.float().div_(255).sub_(self.image_mean).div_(self.image_std)

    def encode_image(self, images: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to mixture tokens [B, K, D] in float32 (not normalised).

        Where texts attend to patches, these follow: [B, K + L, D]; L is what patch dropout keeps in training.
        """
        check_images(images, None if self.visual.takes_any_size else self.visual.image_size)
        return full_precision(self.visual(images.to(next(self.visual.parameters()).dtype)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Map token ids [T, context] to unit-norm text features [T, D] in float32."""
        check_tokens(tokens, getattr(self.text, "context_length", None))
        return unit_norm(self.text(tokens))

    def encode_image_features(self, features: Tensor) -> Tensor:
        """Map `visual.frozen_features` [B, L, W] of any float dtype to mixture tokens [B, K, D], as `encode_image`."""
        check_cached(features, "[B, L, W]")
        return full_precision(self.visual.from_features(features.to(next(self.visual.parameters()).dtype)))

    def encode_text_features(self, features: Tensor) -> Tensor:
        """Map `frozen_text_features` [T, W] of any float dtype to text features [T, D], as `encode_text`."""
        check_cached(features, "[T, W]")
        return unit_norm(text_from_features(self.text, features.to(next(self.text.parameters()).dtype)))

    def similarity(self, h: Tensor, t: Tensor, memory_budget: int | None = None) -> Tensor:
        """Return the cosine of every image and text [B, T] in float32, exact, in tiles over texts.

        Args:
            h: mixture tokens [B, K, D] from `encode_image`.
            t: unit-norm text features [T, D], from `encode_text` or an average of them re-normalised.
            memory_budget: bytes that the tiles may take.
        """
        self._check_features(h, t)
        return self.pooling.scores(h, t, memory_budget)

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the unit-norm image features conditioned on each text [B, T, D]: dense, for small B x T."""
        self._check_features(h, t)
        return self.pooling.contextualize(h, t)

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the weights over mixture tokens [B, T, M, K] in float32 (M = 1 for text-free poolings)."""
        self._check_features(h, t)
        return self.pooling.mixture_weights(h, t)

    def _check_features(self, h: Tensor, t: Tensor) -> None:
        tokens = None if self.training and self.visual.gives_patches else self.visual.output_tokens
        check_features(h, t, tokens, unit_norm=not self.training)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the cosine of every image and text [B, T]."""
        return self.similarity(self.encode_image(images), self.encode_text(tokens))

    def train(self, mode: bool = True) -> "Llip":
        """Set training mode; a module of which every parameter is locked stays in eval mode.

        Locked parts therefore drop nothing and keep their BatchNorm statistics.
        """
        super().train(mode)
        for module in (*self.visual.modules(), *self.text.modules()):
            parameters = list(module.parameters())
            if mode and parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute both towers' blocks in the backward pass: less memory, the same values."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale within [0, ln 100]; called after each optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
