"""A pooling, an objective, an image transform and a caption transform, and a config that trains with them, in one file.

    python -m llip.main examples/extensions.py:custom

Each is named `path/to/file.py:Name`, in a config or on the command line:

    python -m llip.main llip_quickstart pooling=examples/extensions.py:GatedTokens
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.configs import Config
from llip.open_clip.objectives.matches import Matches
from llip.open_clip.objectives.objective import CombineColumns, Objective
from llip.open_clip.pooling import TextFreePooling, unit_norm
from llip.run_configs.quickstart import llip_quickstart


class GatedTokens(TextFreePooling):
    """Weights over tokens that depend on the image, but not on the text."""

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


def hinge(
    scores: Tensor, matches: Matches, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None
) -> Tensor:
    """Hinge over texts: the worst of an image's own should score higher than those of others by 1 / scale (VSE++)."""
    own = matches.positives(scores).amin(dim=0)[:, None]  # [B, 1]
    rows = matches.offset + torch.arange(matches.images, device=scores.device)
    negative = rows[:, None] != matches.owners(scores.device)  # [B, T]
    losses = F.relu(1 + scale * (scores - own)) * negative
    return losses.mean(dim=1).mean()


HINGE = Objective(hinge, scale=10.0, bias=None)


def dimmed(image: np.ndarray, seed: int) -> np.ndarray:
    """Return an image [H, W, 3] uint8 with 70 to 100 % of its brightness."""
    factor = np.random.default_rng(seed).uniform(0.7, 1.0)
    return (image * factor).astype(np.uint8)


def without_article(caption: str, seed: int) -> str:
    """Return a caption without its leading article, every other time."""
    article, _, rest = caption.partition(" ")
    return rest if article.lower() in ("a", "an", "the") and rest and seed % 2 else caption


def custom() -> Config:
    """The quickstart with all four."""
    here = Path(__file__)
    return llip_quickstart().replace(
        pooling=f"{here}:GatedTokens",
        loss=f"{here}:HINGE",
        image_transform=f"{here}:dimmed",
        caption_transform=f"{here}:without_article",
    )
