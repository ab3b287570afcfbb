"""Exact scores of every image against every text under text-conditioned pooling, in tiles over texts.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.

Done plainly, each of the B x T pairs needs its own feature z (D numbers) and a D x D product. With the rows of
`P_i` [MK, D] being W_O^m v_ikm and `a_ij` [MK] the attention weights of a pair, z_ij = P_i^T a_ij, hence

    s_ij = (sum_mk a_ijmk v_ikm . (W_O^T t_j)_m) / sqrt(a_ij^T G_i a_ij),    G_i = P_i P_i^T  [MK, MK].

No z is formed, and a pair costs 2KD + D + (MK)^2 multiply-adds in the place of 2KD + D^2. Where that is not cheaper (a
large MK, or few texts per Gram matrix) z is formed, tile by tile. Both forms are exact. Tiles that do not fit the
memory budget are recomputed in the backward pass.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MIN_SQUARED_NORM = 1e-12
"""Floor under |z|^2 before the root: the quadratic form cancels, and degenerate tokens give zero."""

DEFAULT_MEMORY_BUDGET = 1 << 30
"""Bytes that the tiles of one call may keep."""


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32; float64 stays, so that the same code can be checked against itself in double."""
    return x if x.dtype == torch.float64 else x.float()


def gram_is_cheaper(images: int, texts: int, tokens: int, heads: int, width: int) -> bool:
    """Tell whether the Gram form needs fewer multiply-adds than forming z, counting the once-per-image part."""
    rows = tokens * heads
    per_image = tokens * width**2 + rows**2 * width
    return per_image + texts * (rows**2 + width) < texts * (tokens * width + width**2)


def _attention(keys: Tensor, queries: Tensor) -> Tensor:
    """Softmax over K of keys [B, M, K, d] against (scaled) queries [T, M, d]: weights [B, M, K, T] in float32."""
    logits = torch.matmul(keys, queries.permute(1, 2, 0))  # [B, M, K, T]
    return full_precision(logits).softmax(dim=2)


def _gram(values: Tensor, out_weight: Tensor) -> Tensor:
    """G_i = P_i P_i^T [B, MK, MK] in float32, from values [B, M, K, d] and W_O [D, D]."""
    heads, head_width = values.shape[1], values.shape[3]
    per_head = out_weight.T.unflatten(0, (heads, head_width))  # [M, d, D]: W_O^m transposed
    rows = torch.matmul(values, per_head).flatten(1, 2)  # [B, MK, D]
    rows = full_precision(rows)
    return rows @ rows.transpose(1, 2)


def _gram_tile(keys: Tensor, values: Tensor, gram: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    """Scores [B, T] of one tile of texts, without forming z."""
    weights = _attention(keys, queries)  # [B, M, K, T]
    projections = torch.matmul(values, targets.permute(1, 2, 0))  # [B, M, K, T]
    numerator = (weights * full_precision(projections)).sum(dim=(1, 2))  # [B, T]
    rows = weights.flatten(1, 2)  # [B, MK, T]
    squared_norm = (rows * torch.bmm(gram, rows)).sum(dim=1)  # [B, T]
    return numerator * squared_norm.clamp_min(MIN_SQUARED_NORM).rsqrt()


def _dense_tile(keys: Tensor, values: Tensor, out_weight: Tensor, queries: Tensor, texts: Tensor) -> Tensor:
    """Scores [B, T] of one tile of texts, by forming z [B, T, D]."""
    weights = _attention(keys, queries)  # [B, M, K, T]
    mixed = torch.matmul(weights.transpose(2, 3).to(values.dtype), values)  # [B, M, T, d]
    z = torch.matmul(mixed.transpose(1, 2).flatten(2), out_weight.T)  # [B, T, D]
    z = full_precision(z)
    numerator = torch.einsum("btd,td->bt", z, texts.to(z.dtype))
    return numerator * z.square().sum(dim=-1).clamp_min(MIN_SQUARED_NORM).rsqrt()


def pairwise_scores(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    targets: Tensor,
    texts: Tensor,
    out_weight: Tensor,
    *,
    memory_budget: int | None = None,
    tile_texts: int | None = None,
    use_gram: bool | None = None,
) -> Tensor:
    """Return the scores z_ij . t_j of all pairs.

    Args:
        keys, values: of the images' mixture tokens [B, M, K, d].
        queries: of the texts, temperature included [T, M, d].
        targets: W_O^T t_j by head [T, M, d].
        texts: unit-norm text features [T, D].
        out_weight: W_O [D, D].
        memory_budget: bytes that tiles may keep between forward and backward.
        tile_texts, use_gram: force the tile size or the form; by default both follow from the shapes.

    Returns:
        Cosines [B, T] in float32, the same for any tile size to rounding.
    """
    images, heads, tokens, _ = keys.shape
    count, width = texts.shape
    if use_gram is None:
        use_gram = gram_is_cheaper(images, count, tokens, heads, width)
    budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
    kept_per_text = 4 * images * (5 * heads * tokens + (0 if use_gram else 3 * width))  # bytes
    recompute = torch.is_grad_enabled() and kept_per_text * count > budget
    if tile_texts is None:
        tile_texts = max(16, min(512, budget // (4 * kept_per_text)))
    dtype = torch.promote_types(keys.dtype, values.dtype)
    keys, values, queries, targets = (x.to(dtype) for x in (keys, values, queries, targets))
    with torch.autocast(keys.device.type, enabled=False):
        fixed = _gram(values, out_weight.to(dtype)) if use_gram else out_weight.to(dtype)
        tile = _gram_tile if use_gram else _dense_tile
        per_text = targets if use_gram else texts
        parts = []
        for q, u in zip(queries.split(tile_texts), per_text.split(tile_texts), strict=True):
            if recompute:
                parts.append(checkpoint(tile, keys, values, fixed, q, u, use_reentrant=False))
            else:
                parts.append(tile(keys, values, fixed, q, u))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
