"""The scores in PyTorch's own operations, tile by tile: the reference, and what runs where no kernel does.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.scores.gram import (
    doubled_above_diagonal,
    full_precision,
    image_gram,
    image_gram_backward,
    without_autocast,
)
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import ScorePlan, slices
from llip.open_clip.scores.tiles import GRAM_FORMS, Gradients, accumulate, attention, inverse_norm, norm_slope


def eager_scores(inputs: ScoreInputs, plan: ScorePlan, training: bool) -> Tensor:
    """Return the scores [B, T]; with `training` so that gradients can follow."""
    return _Scores.apply(plan, *inputs) if training else _scores_only(inputs, plan)[0]


class _Block:
    """Some images, whose Gram matrices are in memory at once, and the tiles they are cut into."""

    def __init__(self, place: slice, inputs: ScoreInputs, plan: ScorePlan, training: bool) -> None:
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
    """Scores [B, T] of `ScoreInputs`, tile by tile."""

    @staticmethod
    def forward(ctx, plan: ScorePlan, *inputs: Tensor) -> Tensor:
        parts = ScoreInputs(*inputs)
        ctx.plan = plan
        kept_tiles: list[Tensor] = []
        if not plan.keep:
            scores, norms = _scores_only(parts, plan)
        else:
            scores, norms = _empty_scores(parts, plan)
            ctx.block = block = _Block(slice(0, len(scores)), parts, plan, training=True)
            for columns in slices(len(parts.texts), plan.tile_texts):
                queries, targets = parts.project(columns)
                for local, images in block.tiles:
                    keys, values = parts.images(images)
                    tile = block.form.parts(local, values, targets, attention(keys, queries))
                    ratio = _store(block.form.fractions_of(tile), scores[images, columns], norms[:, images, columns])
                    kept_tiles += block.form.slope(tile, ratio)
        ctx.save_for_backward(*inputs, norms, *kept_tiles)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        inputs = ScoreInputs(*saved[: len(ScoreInputs._fields)])
        norms, *kept = saved[len(inputs) :]
        kept_tiles = iter(kept) if plan.keep else None
        gradients = ScoreInputs(*(torch.zeros_like(x, dtype=inputs.shared.dtype) for x in inputs))
        with without_autocast(upstream.device):
            for place in slices(len(upstream), plan.block_images):
                block = ctx.block if plan.keep else _Block(place, inputs, plan, training=True)
                of_matrix = torch.zeros_like(block.form.matrix)
                for columns in slices(len(inputs.texts), plan.tile_texts):
                    _backward_column(block, inputs, columns, upstream, norms, kept_tiles, gradients, of_matrix)
                if plan.form == "image_gram":
                    values = full_precision(inputs.values[:, place])
                    of_values, of_matrix = image_gram_backward(values, inputs.shared, of_matrix)
                    gradients.values[:, place] += of_values
                else:
                    of_matrix = doubled_above_diagonal(of_matrix)
                gradients.shared.add_(of_matrix)
                del block
        return None, *(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


def _empty_scores(inputs: ScoreInputs, plan: ScorePlan) -> tuple[Tensor, Tensor]:
    """Return room for scores [B, T] and for r and c r^2 [2, B, T], which is empty if they are not to be kept."""
    images, texts = inputs.keys.shape[1], len(inputs.texts)
    scores = inputs.texts.new_empty(images, texts, dtype=inputs.shared.dtype)
    return scores, scores.new_empty(2, images, texts if plan.keep_norms else 0)


def _store(fractions: tuple[Tensor, Tensor], scores: Tensor, norms: Tensor) -> Tensor:
    """Write the scores of a tile [n, t], and r and c r^2 [2, n, t] if there is room, of c and |z|^2; return c r^2."""
    numerator, squared = fractions
    inverse = inverse_norm(squared)
    torch.mul(numerator, inverse, out=scores)
    ratio = norm_slope(numerator, squared, inverse)
    if norms.numel():
        norms[0], norms[1] = inverse, ratio
    return ratio


def _backward_column(
    block: _Block,
    inputs: ScoreInputs,
    columns: slice,
    upstream: Tensor,
    norms: Tensor,
    kept_tiles: Iterator[Tensor] | None,
    gradients: ScoreInputs,
    of_matrix: Tensor,
) -> None:
    """Add the gradients of a block of images against one tile of texts to `gradients` and `of_matrix`.

    Args:
        norms: r and c r^2 [2, B, T] if the forward pass kept them, otherwise [2, B, 0].
        kept_tiles: what the forward pass kept; None: it is computed again.
    """
    queries, targets = inputs.project(columns)
    of_queries, of_targets = (torch.zeros_like(x, dtype=gradients.texts.dtype) for x in (queries, targets))
    for local, images in block.tiles:
        keys, values = inputs.images(images)
        form = block.form
        weights, tile_norms = None, norms[:, images, columns]
        if kept_tiles is None or form.needs_weights:
            weights = attention(keys, queries)
        if kept_tiles is not None:
            kept = next(kept_tiles), next(kept_tiles)
        else:
            assert weights is not None
            parts = form.parts(local, values, targets, weights)
            weights = weights if form.needs_weights else None  # free the memory
            if not norms.numel():
                tile_norms = norms.new_empty(2, *upstream[images, columns].shape)
                _store(form.fractions_of(parts), torch.empty_like(tile_norms[0]), tile_norms)
            kept = form.slope(parts, tile_norms[1])
            del parts
        inverse, ratio = tile_norms
        tile_gradients = Gradients(gradients.values[:, images], of_targets, of_matrix)
        of_scores = upstream[images, columns] * inverse
        of_logits = form.backward(local, values, targets, weights, kept, ratio, of_scores, tile_gradients)
        of_logits = of_logits.flatten(1, 2)  # [M, nK, t]
        accumulate(gradients.keys[:, images].flatten(1, 2), of_logits, queries.transpose(1, 2))
        accumulate(of_queries, keys.flatten(1, 2).transpose(1, 2), of_logits)
        del weights, kept, of_logits
    inputs.add_projected(columns, of_queries.flatten(0, 1), of_targets.flatten(0, 1), gradients)


def _scores_only(inputs: ScoreInputs, plan: ScorePlan) -> tuple[Tensor, Tensor]:
    """Return what `_empty_scores` makes room for, without what else gradients need: half of a matrix is enough then."""
    scores, norms = _empty_scores(inputs, plan)
    for place in slices(len(scores), plan.block_images):
        block = _Block(place, inputs, plan, training=False)
        for columns in slices(len(inputs.texts), plan.tile_texts):
            queries, targets = inputs.project(columns)
            for local, images in block.tiles:
                keys, values = inputs.images(images)
                fractions = block.form.fractions(local, values, targets, attention(keys, queries))
                _store(fractions, scores[images, columns], norms[:, images, columns])
    return scores, norms
