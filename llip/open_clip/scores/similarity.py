"""Exact scores of every image against every text under text-conditioned pooling, in tiles over texts and images.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.

Done plainly, each of the B x T pairs needs its own feature z (D numbers) and a D x D product. With the rows of
`P_i` [MK, D] being W_O^m v_ikm and `a_ij` [MK] the attention weights of a pair, z_ij = P_i^T a_ij, hence

    s_ij = (sum_mk a_ijmk v_ikm . (W_O^T t_j)_m) / |z_ij|

and the norm comes in three ways, all exact; the shape says which is the cheapest (`scores.plan`):

    image_gram    |z|^2 = a^T G_i a,              G_i = P_i P_i^T [MK, MK], once per image
    shared_gram   |z|^2 = m^T (W_O^T W_O) m,      m_ij = the mixed values sum_k a_ijmk v_ikm [D]
    features      |z|^2 = |W_O m|^2               z is formed: for so few pairs that no Gram matrix pays

A Gram matrix costs two products per pair in forward and backward together, where features cost three: the product that
gives the norm is its gradient as well. Nothing of size B x T x (K, M or D) stays unless the memory budget has room for
it: tiles that do not fit are computed again in the backward pass. Texts are projected tile by tile.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.scores.gram import doubled_above_diagonal, full_precision, image_gram, image_gram_backward
from llip.open_clip.scores.plan import Form, ScorePlan, plan_scores, slices
from llip.open_clip.scores.tiles import GRAM_FORMS, Gradients, accumulate, attention, inverse_norm


class _Inputs(NamedTuple):
    """What scores are computed from: see `pairwise_scores`."""

    keys: Tensor  # [M, B, K, d]
    values: Tensor  # [M, B, K, d]
    texts: Tensor  # [T, D]
    query_weight: Tensor  # [D, D], the gain included
    out_weight: Tensor  # [D, D]
    shared: Tensor  # W_O^T W_O [D, D]

    def project(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return queries and targets W_O^T t_j [M, d, t] of some texts, in the dtype of the keys."""
        texts = self.texts[columns].to(self.keys.dtype).T
        queries, targets = (weight.to(texts.dtype) @ texts for weight in (self.query_weight, self.out_weight.T))
        by_head = (len(self.keys), -1)
        return queries.unflatten(0, by_head), targets.unflatten(0, by_head)

    def images(self, images: slice) -> tuple[Tensor, Tensor]:
        """Return keys and values of some images."""
        return self.keys[:, images], self.values[:, images]


class _Block:
    """Some images, whose Gram matrices are in memory at once, and the tiles they are cut into."""

    def __init__(self, place: slice, inputs: _Inputs, plan: ScorePlan, training: bool) -> None:
        """Form the matrices of the images at `place`; with `training` so that `backward` can follow."""
        matrix = inputs.shared
        if plan.form == "image_gram":
            matrix = image_gram(full_precision(inputs.values[:, place]), inputs.shared)
        self.form = GRAM_FORMS[plan.form](matrix, training)
        self.tiles = [  # (place in the block, place among all images)
            (tile, slice(tile.start + place.start, tile.stop + place.start))
            for tile in slices(place.stop - place.start, plan.tile_images)
        ]


class _Scores(torch.autograd.Function):
    """Scores [B, T] of `_Inputs`, tile by tile."""

    @staticmethod
    def forward(ctx, plan: ScorePlan, *inputs: Tensor) -> Tensor:
        parts = _Inputs(*inputs)
        ctx.plan = plan
        if not plan.keep:
            ctx.save_for_backward(*inputs)
            return _scores_only(parts, plan)
        scores = parts.texts.new_empty(parts.keys.shape[1], len(parts.texts), dtype=parts.shared.dtype)
        ctx.block = block = _Block(slice(0, len(scores)), parts, plan, training=True)
        kept_tiles: list[Tensor] = []
        for columns in slices(len(parts.texts), plan.tile_texts):
            queries, targets = parts.project(columns)
            for local, images in block.tiles:
                keys, values = parts.images(images)
                weights = attention(keys, queries)
                scores[images, columns], kept = block.form.forward(local, values, targets, weights)
                kept_tiles.extend((weights, *kept) if block.form.keeps_weights else kept)
        ctx.save_for_backward(*inputs, *kept_tiles)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        inputs = _Inputs(*saved[: len(_Inputs._fields)])
        kept_tiles = iter(saved[len(inputs) :]) if plan.keep else None
        gradients = _Inputs(*(torch.zeros_like(x, dtype=inputs.shared.dtype) for x in inputs))
        with torch.autocast(upstream.device.type, enabled=False):
            for place in slices(len(upstream), plan.block_images):
                block = ctx.block if plan.keep else _Block(place, inputs, plan, training=True)
                of_matrix = torch.zeros_like(block.form.matrix)
                for columns in slices(len(inputs.texts), plan.tile_texts):
                    _backward_column(block, inputs, columns, upstream, kept_tiles, gradients, of_matrix)
                if plan.form == "image_gram":
                    values = full_precision(inputs.values[:, place])
                    of_values, of_matrix = image_gram_backward(values, inputs.shared, of_matrix)
                    gradients.values[:, place] += of_values
                else:
                    of_matrix = doubled_above_diagonal(of_matrix)
                gradients.shared.add_(of_matrix)
                del block
        return None, *(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


def _backward_column(
    block: _Block,
    inputs: _Inputs,
    columns: slice,
    upstream: Tensor,
    kept_tiles: Iterator[Tensor] | None,
    gradients: _Inputs,
    of_matrix: Tensor,
) -> None:
    """Add the gradients of a block of images against one tile of texts to `gradients` and `of_matrix`.

    Args:
        kept_tiles: what the forward pass kept; None: it is computed again.
    """
    queries, targets = inputs.project(columns)
    of_queries, of_targets = (torch.zeros_like(x, dtype=gradients.texts.dtype) for x in (queries, targets))
    for local, images in block.tiles:
        keys, values = inputs.images(images)
        form = block.form
        if kept_tiles is None:
            weights = attention(keys, queries)
            _, kept = form.forward(local, values, targets, weights)
        else:
            weights = next(kept_tiles) if form.keeps_weights else attention(keys, queries)
            kept = tuple(itertools.islice(kept_tiles, form.kept_tensors))
        tile_gradients = Gradients(gradients.values[:, images], of_targets, of_matrix)
        of_logits = form.backward(local, values, targets, weights, kept, upstream[images, columns], tile_gradients)
        of_logits = of_logits.flatten(1, 2)  # [M, nK, t]
        accumulate(gradients.keys[:, images].flatten(1, 2), of_logits, queries.transpose(1, 2))
        accumulate(of_queries, keys.flatten(1, 2).transpose(1, 2), of_logits)
        del weights, kept, of_logits
    texts = inputs.texts[columns].to(gradients.texts.dtype)
    for of_projected, weight, of_weight in (
        (of_queries, inputs.query_weight, gradients.query_weight),
        (of_targets, inputs.out_weight.T, gradients.out_weight.T),
    ):
        of_projected = of_projected.flatten(0, 1)  # [D, t]
        of_weight.addmm_(of_projected, texts)
        gradients.texts[columns].addmm_(of_projected.T, weight.to(of_projected.dtype))


def pairwise_scores(
    keys: Tensor,
    values: Tensor,
    texts: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    query_gain: float = 1.0,
    *,
    memory_budget: int | None = None,
    form: Form | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Return the scores z_ij . t_j of all pairs.

    Args:
        keys, values: of the images' mixture tokens [M, B, K, d]; their dtype is that of the large products.
        texts: unit-norm text features [T, D].
        query_weight, out_weight: W_Q and W_O [D, D].
        query_gain: factor of the queries, 1 / temperature included.
        memory_budget: bytes beyond inputs and result; None takes the default of `scores.plan`.
        form, tile: force the form or the tile (images, texts); by default both follow from the shapes.

    Returns:
        Cosines [B, T] in float32, the same for any form and tile to rounding. Softmax, norms, Gram matrices and
        quadratic forms are float32 whatever the dtype of keys and values (float64 stays float64).
    """
    heads, images, tokens, size = keys.shape
    assert images * len(texts) > 0, f"no scores of {images} images and {len(texts)} texts"
    dtype = torch.promote_types(keys.dtype, values.dtype)
    keys, values = keys.to(dtype).contiguous(), values.to(dtype).contiguous()
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (keys, values, texts, query_weight, out_weight))
    plan = plan_scores(
        images, len(texts), tokens, heads, heads * size,
        training=training, on_cpu=keys.device.type == "cpu", budget=memory_budget, form=form, tile=tile,
    )  # fmt: skip
    with torch.autocast(keys.device.type, enabled=False):
        if plan.form == "features":
            return _scores_of_features(keys, values, texts, query_gain, query_weight, out_weight)
        query_weight, out_weight = query_gain * full_precision(query_weight), full_precision(out_weight)
        inputs = _Inputs(keys, values, texts, query_weight, out_weight, out_weight.T @ out_weight)
        return _Scores.apply(plan, *inputs) if training else _scores_only(inputs, plan)


def _scores_of_features(
    keys: Tensor, values: Tensor, texts: Tensor, query_gain: float, query_weight: Tensor, out_weight: Tensor
) -> Tensor:
    """Return the scores by forming every z: the plainest form, for few pairs."""
    low_texts, query_weight, out_weight = (x.to(keys.dtype) for x in (query_gain * texts, query_weight, out_weight))
    queries = (query_weight @ low_texts.T).unflatten(0, (len(keys), -1))  # [M, d, T]
    weights = attention(keys, queries).to(values.dtype)  # [M, B, K, T]
    mixed = torch.matmul(weights.transpose(2, 3), values)  # [M, B, T, d]
    z = full_precision(mixed.permute(1, 2, 0, 3).flatten(2) @ out_weight.T)  # [B, T, D]
    numerator = (z * full_precision(texts)).sum(dim=-1)
    return numerator * inverse_norm(z.square().sum(dim=-1))


def _scores_only(inputs: _Inputs, plan: ScorePlan) -> Tensor:
    """Return the scores without what gradients need: half of a symmetric matrix is enough then."""
    scores = inputs.texts.new_empty(inputs.keys.shape[1], len(inputs.texts), dtype=inputs.shared.dtype)
    for place in slices(len(scores), plan.block_images):
        block = _Block(place, inputs, plan, training=False)
        for columns in slices(len(inputs.texts), plan.tile_texts):
            queries, targets = inputs.project(columns)
            for local, images in block.tiles:
                keys, values = inputs.images(images)
                scores[images, columns] = block.form.scores(local, values, targets, attention(keys, queries))
    return scores
