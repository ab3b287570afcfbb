"""The numbers behind the figure: scores, weights over mixture tokens, and maps of where tokens look.

Shapes: B images, T captions, M heads, K mixture tokens, H x W patches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from llip.open_clip.model import Llip
from llip.open_clip.pooling import TextFreePooling
from llip.tools.explain.attention import How, patch_grid, token_attention

_TOKENS = {"mixture": "mixture tokens", "patches": "patches", "both": "mixture tokens and patches"}  # by `pair_tokens`


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Scores, weights and maps of some images and captions, on the CPU."""

    names: list[str]  # of the images
    captions: list[str]
    scores: Tensor  # cosines [B, T]
    weights: Tensor  # over the tokens that captions attend to, by head [B, T, M, K]
    attention: Tensor | None  # of these tokens over patches [B, K, H, W]
    how: str  # last, rollout or none
    pooling: str
    tokens: str  # what captions attend to: mixture tokens, patches or both
    text_conditioned: bool  # the weights may differ between captions
    squashed: bool  # the model sees the whole image made square, not the square in its middle
    notes: list[str]  # why something is not shown for this model

    @property
    def mean_weights(self) -> Tensor:
        """Weights over tokens, averaged over heads [B, T, K]."""
        return self.weights.mean(dim=2)

    def caption_maps(self, image: int) -> Tensor:
        """Where each caption looks [T, H, W]: the maps of the tokens, weighted as the caption weighs them."""
        assert self.attention is not None, "there are no maps"
        return torch.einsum("tk,khw->thw", self.mean_weights[image], self.attention[image])

    def to_dict(self, tokens: int) -> dict[str, Any]:
        """Return plain containers for json, with maps of the `tokens` of each image that matter most."""
        record: dict[str, Any] = {
            "captions": self.captions,
            "pooling": self.pooling,
            "attention": self.how,
            "notes": self.notes,
            "images": [],
        }
        for i, name in enumerate(self.names):
            chosen = tokens_that_matter(self.mean_weights[i], tokens)
            image = {
                "name": name,
                "scores": _rounded(self.scores[i]),
                "weights": _rounded(self.mean_weights[i]),
                "weights_by_head": _rounded(self.weights[i]),
                "effective_tokens": _rounded(effective_tokens(self.mean_weights[i])),
                "tokens": chosen,
            }
            if self.attention is not None:
                image["token_maps"] = _rounded(self.attention[i, chosen])
                image["caption_maps"] = _rounded(self.caption_maps(i))
            record["images"].append(image)
        return record


def _rounded(values: Tensor) -> list:
    return torch.round(values.double(), decimals=5).tolist()


def effective_tokens(weights: Tensor) -> Tensor:
    """Return exp(entropy) of weights [..., K]: 1 when one token has all the weight, K when all weigh the same."""
    return torch.special.entr(weights.double()).sum(dim=-1).exp()


def tokens_that_matter(weights: Tensor, count: int) -> list[int]:
    """Return up to `count` tokens, in the order of the largest weight that a caption gives them.

    Args:
        weights: over mixture tokens, averaged over heads [T, K].
    """
    return weights.amax(dim=0).sort(descending=True, stable=True).indices[:count].tolist()


def _notes(model: Llip) -> list[str]:
    if model.config["mixture_tokens"] == 1 and model.config["pair_tokens"] == "mixture":
        return ["One mixture token: its weight is 1, and the feature does not depend on the caption."]
    if isinstance(model.pooling, TextFreePooling):
        return [f"Pooling '{model.config['pooling']}' ignores the caption: an image has one set of weights."]
    return []


def _attended_maps(model: Llip, pixels: Tensor, how: How) -> Tensor:
    """Return where each token that captions attend to looks [B, K, H, W]; a patch looks at its own place."""
    which, (height, width) = model.config["pair_tokens"], patch_grid(model.visual)
    patches = torch.eye(height * width, device=pixels.device).unflatten(1, (height, width))
    patches = patches.expand(len(pixels), -1, -1, -1)
    if which == "patches":
        return patches
    maps = token_attention(model.visual, pixels, how).float()
    return torch.cat([maps, patches], dim=1) if which == "both" else maps


@torch.no_grad()
def explain(
    model: Llip,
    images: Sequence[Image.Image],
    names: Sequence[str],
    captions: Sequence[str],
    how: How | Literal["none"] = "last",
) -> Explanation:
    """Score every image against every caption; return scores, weights and maps.

    Args:
        model: as `llip.open_model` returns it, on any device.
        images: RGB.
        names: of the images.
        captions: at least one.
        how: last or rollout (see `attention.token_attention`), or none for no maps.

    Raises:
        UserError: the weights of the tower's attention are unknown.
    """
    device = next(model.parameters()).device
    pixels = torch.stack([model.preprocess_val(image) for image in images]).to(device)
    h = model.encode_image(pixels)
    t = model.encode_text(model.tokenizer(list(captions)).to(device))
    attention = None if how == "none" else _attended_maps(model, pixels, how).cpu()
    weights = model.mixture_weights(h, t).float().cpu()
    return Explanation(
        names=list(names),
        captions=list(captions),
        scores=model.similarity(h, t).cpu(),
        weights=weights,
        attention=attention,
        how=how,
        pooling=model.config["pooling"],
        tokens=_TOKENS[model.config["pair_tokens"]],
        text_conditioned=weights.shape[-1] > 1 and not isinstance(model.pooling, TextFreePooling),
        squashed=model.config["architecture"].get("resize_mode") == "squash",
        notes=_notes(model),
    )
