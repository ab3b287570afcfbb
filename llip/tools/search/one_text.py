"""Exact scores of one text against many images, by projecting the text instead of the images' tokens.

Shapes: B images, K mixture tokens, M heads, D embedding width, d = D / M.

`similarity` forms keys and values of every image, 2 K D^2 multiply-adds, which many texts share. A query is one text:
W_K moves to its side, and the tokens are mixed before W_V sees them. An image then takes 2 M K D + 2 D^2: a twentieth
at K = 32, D = 512, M = 8. It is the same number, summed in another order.
"""

from typing import TypeGuard

import torch
from torch import Tensor

from llip.open_clip.pooling import NORM_EPS, TextConditionedPooling, unit_norm

_PARAMETERS = {f"{name}_proj.weight" for name in ("q", "k", "v", "out")}


def applies_to(pooling: object) -> TypeGuard[TextConditionedPooling]:
    """Return whether `scores_of_one_text` computes this pooling: four matrices and nothing else."""
    if type(pooling) is not TextConditionedPooling:  # a subclass may compute otherwise
        return False
    return {name for name, _ in [*pooling.named_parameters(), *pooling.named_buffers()]} == _PARAMETERS


@torch.no_grad()
def scores_of_one_text(pooling: TextConditionedPooling, h: Tensor, t: Tensor) -> Tensor:
    """Return the cosines [B] of images and one text, float32.

    Args:
        pooling: one that `applies_to` holds for.
        h: mixture tokens [B, K, D], float32 (or what else the pooling pairs with texts).
        t: unit-norm text feature [D].
    """
    h = pooling.attended(h)
    heads, width = pooling.heads, h.shape[-1]
    key_weight, value_weight = (
        projection.weight.unflatten(0, (heads, -1)) for projection in (pooling.k_proj, pooling.v_proj)
    )  # [M, d, D]
    queries = pooling.queries(t[None])[0]  # [M, d]
    folded = torch.einsum("md,mdw->wm", queries, key_weight) * width**0.5  # [D, M]
    lengths = h.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)
    weights = (h @ folded / lengths).softmax(dim=1)  # [B, K, M]
    mixed = weights.transpose(1, 2) @ h  # [B, M, D]
    z = pooling.out_proj(torch.einsum("bmw,mdw->bmd", mixed, value_weight).flatten(1))
    return unit_norm(z) @ t
