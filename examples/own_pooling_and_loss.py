"""A pooling and an objective of one's own, and the config that trains with them, in one file.

    python -m llip.main examples/own_pooling_and_loss.py:gated

Evaluations and `llip.load_pretrained` know the names once this file has been read: name the config in the evaluation's
YAML (`mc_config_name: examples/own_pooling_and_loss.py:gated`), or import the file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.configs import Config
from llip.extensions import objectives, poolings
from llip.open_clip.objectives import CombineColumns, Objective
from llip.open_clip.pooling import TextFreePooling, unit_norm
from llip.run_configs.quickstart import llip_quickstart


@poolings.register("gated")
class GatedTokens(TextFreePooling):
    """Each token says by itself how much it counts: weights that depend on the image, but not on the text."""

    def __init__(self, mixture_tokens: int, width: int) -> None:
        super().__init__(mixture_tokens)
        self.gate = nn.Linear(width, 1)

    @classmethod
    def build(cls, mixture_tokens: int, width: int, heads: int, temperature: float) -> "GatedTokens":
        return cls(mixture_tokens, width)

    def image_weights(self, h: Tensor) -> Tensor:
        """Return weights over mixture tokens [B, K] of [B, K, D]."""
        return self.gate(h).squeeze(-1).float().softmax(dim=-1)

    def forward(self, h: Tensor) -> Tensor:
        return unit_norm(torch.einsum("bk,bkd->bd", self.image_weights(h), h))

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        """Return [B, T, 1, K]."""
        return self.image_weights(h)[:, None, None].expand(-1, t.shape[0], -1, -1)


def hinge(scores: Tensor, offset: int, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None) -> Tensor:
    """Every other text should score lower than the own one, by a margin of 1 / scale (VSE; no normalisers to share)."""
    own = scores.diagonal(offset)[:, None]  # [B, 1]
    losses = F.relu(1 + scale * (scores - own))  # [B, T]; the own pair gives 1, and no gradient
    return losses.mean(dim=1).mean()


objectives.register("hinge")(Objective(hinge, scale=10.0, bias=None))


def gated() -> Config:
    """The quickstart with both."""
    return llip_quickstart().replace(pooling="gated", loss="hinge")
