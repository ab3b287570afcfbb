"""The scores in PyTorch's own operations, tile by tile: the reference, and what runs where no kernel does.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.scores.gram import doubled_above_diagonal, full_precision, image_gram, image_gram_backward
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import ScorePlan, slices
from llip.open_clip.scores.tiles import GRAM_FORMS, Gradients, accumulate, attention


def eager_scores(inputs: ScoreInputs, plan: ScorePlan, training: bool) -> Tensor:
    """Return the scores [B, T]; with `training` so that gradients can follow."""
    return _Scores.apply(plan, *inputs) if training else _scores_only(inputs, plan)


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
        inputs = ScoreInputs(*saved[: len(ScoreInputs._fields)])
        kept_tiles = iter(saved[len(inputs) :]) if plan.keep else None
        gradients = ScoreInputs(*(torch.zeros_like(x, dtype=inputs.shared.dtype) for x in inputs))
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
    inputs: ScoreInputs,
    columns: slice,
    upstream: Tensor,
    kept_tiles: Iterator[Tensor] | None,
    gradients: ScoreInputs,
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
    inputs.add_projected(columns, of_queries.flatten(0, 1), of_targets.flatten(0, 1), gradients)


def _scores_only(inputs: ScoreInputs, plan: ScorePlan) -> Tensor:
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
