"""The scores of one tile of pairs and their gradients, in the two forms with a Gram matrix (see `similarity`).

Shapes: n images and t texts of the tile, K mixture tokens, M heads, D embedding width, d = D / M, R = MK.
Products over heads read and write "heads first" [M, n, K, t], products with an image's Gram matrix "rows first"
[n, MK, t]; both are the same memory when n = 1. On a GPU every visit of such an array costs as much as the product that
it belongs to, so elementwise steps convert layout and dtype on their way instead of in separate copies.

Scores are s = c r with c the numerator and r = 1 / |z|. The quadratic form |z|^2 = x^T S x of a symmetric S has the
gradient 2 S x, whose product is formed for the norm already:

    d s / d x = r (d c / d x - c r^2 S x)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llip.open_clip.scores.gram import doubled_above_diagonal, product, quadratic_form, upper_blocks

MIN_SQUARED_NORM = 1e-12
"""Floor under |z|^2 before the root: the quadratic form cancels, and degenerate tokens give zero."""

Parts = tuple[Tensor, Tensor, Tensor]
Kept = tuple[Tensor, Tensor]


class Gradients(NamedTuple):
    """Sums over tiles, in full precision, that the backward pass of a tile adds to."""

    values: Tensor  # [M, n, K, d]
    targets: Tensor  # [M, d, t]
    matrix: Tensor  # like the matrix of the form, its upper block triangle alone


def to_rows(x: Tensor) -> Tensor:
    """[M, n, K, t] -> [n, MK, t]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3])


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of `left` [b, i, k] and `right` [b, k, j] to `total` [b, i, j], which has full precision."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(product(left, right))


def attention(keys: Tensor, queries: Tensor) -> Tensor:
    """Return the weights over the mixture tokens [M, n, K, t] from keys [M, n, K, d] and queries [M, d, t]."""
    return product(keys.flatten(1, 2), queries).unflatten(1, keys.shape[1:3]).softmax(dim=2)


def attention_backward(weights: Tensor, gradient: Tensor) -> Tensor:
    """Turn the gradient of the attention weights [..., K, t] into that of the logits, in place."""
    return torch.ops.aten._softmax_backward_data.out(gradient, weights, 2, weights.dtype, grad_input=gradient)


def inverse_norm(squared: Tensor) -> Tensor:
    """Return r = 1 / |z| of squared norms."""
    return squared.clamp_min(MIN_SQUARED_NORM).rsqrt()


def norm_slope(numerator: Tensor, squared: Tensor, inverse: Tensor) -> Tensor:
    """Return c r^2, the weight of S x in the slope of the score; zero where the floor holds, as a constant's is."""
    return (numerator * inverse.square()).masked_fill(squared < MIN_SQUARED_NORM, 0)


class GramForm:
    """One of the two ways to the norm through symmetric matrices; what they share."""

    needs_weights: bool
    """`backward` needs the attention weights beside what `slope` returns."""

    def __init__(self, matrix: Tensor, training: bool) -> None:
        """Hold the Gram matrix or matrices; without `training` in the form that `fractions` needs."""
        self.matrix = matrix if training else doubled_above_diagonal(matrix)

    def fractions(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return c and |z|^2 [n, t], without what gradients need.

        Args:
            images: the tile's images among those of the matrices.
            values: [M, n, K, d].
            targets: W_O^T t_j [M, d, t].
            weights: attention weights [M, n, K, t].
        """
        raise NotImplementedError

    def parts(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Parts:
        """Return x, d c / d x and S x, in full precision or that of `values`; arguments as for `fractions`."""
        raise NotImplementedError

    def fractions_of(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return c and |z|^2 [n, t]."""
        raise NotImplementedError

    def slope(self, parts: Parts, ratio: Tensor) -> Kept:
        """Return what `backward` needs, x and a slope of the scores over r, given c r^2 [n, t]; overwrites `parts`."""
        raise NotImplementedError

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        kept: Kept,
        ratio: Tensor,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        """Return the gradient of the logits [M, n, K, t] in the dtype of `values`; add the others to `gradients`.

        Args:
            images, values, targets, weights: as for `fractions`.
            kept: what `slope` returned.
            ratio: c r^2 [n, t].
            upstream: the gradient of the scores, times r [n, t].
            gradients: of what the scores are computed from.
        """
        raise NotImplementedError


class ImageGram(GramForm):
    """|z|^2 = a^T G_i a with one Gram matrix [R, R] per image: z has D numbers and is never formed.

    x is the attention weights a, as [n, M, K, t]; the slope that is kept is that of the logits.
    """

    needs_weights = False

    def fractions(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        numerator = (_agreement(values, targets) * weights).sum(dim=(0, 2))
        return numerator, quadratic_form(self.matrix[images], to_rows(weights))

    def parts(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Parts:
        a = weights.transpose(0, 1).contiguous()
        return (
            a,
            _agreement(values, targets).transpose(0, 1),
            torch.bmm(self.matrix[images], a.flatten(1, 2)).view_as(a),
        )

    def fractions_of(self, parts: Parts) -> tuple[Tensor, Tensor]:
        a, agreement, with_a = parts
        terms = agreement * a
        numerator = terms.sum(dim=(1, 2))
        return numerator, torch.mul(with_a, a, out=terms).sum(dim=(1, 2))

    def slope(self, parts: Parts, ratio: Tensor) -> Kept:
        a, agreement, with_a = parts
        of_a = torch.addcmul(agreement, with_a, ratio[:, None, None], value=-1, out=with_a)
        return a, attention_backward(a, of_a)

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        kept: Kept,
        ratio: Tensor,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        a, slope = kept
        weighted = _heads_first(a, upstream, values.dtype).flatten(1, 2)  # [M, nK, t]
        accumulate(gradients.values.flatten(1, 2), weighted, targets.transpose(1, 2))
        accumulate(gradients.targets, values.flatten(1, 2).transpose(1, 2), weighted)
        del weighted
        left = (a * (-0.5 * ratio * upstream)[:, None, None]).flatten(1, 2)
        right, of_matrix = a.flatten(1, 2).transpose(1, 2), gradients.matrix[images]
        for block, rest in upper_blocks(left.shape[1]):
            of_matrix[:, block, rest].baddbmm_(left[:, block], right[:, :, rest])
        return _heads_first(slope, upstream, values.dtype)


class SharedGram(GramForm):
    """|z|^2 = m^T (W_O^T W_O) m of the mixed values m [D] of a pair: one Gram matrix [D, D] for all of them.

    x is the mixed values, as [M, n, d, t]: 2 D kept numbers per pair, where the weights would be M K more. This form is
    for many tokens, and its weights cost one product to compute again.
    """

    needs_weights = True

    def fractions(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mixed = _mix(values, weights)
        return (mixed * targets[:, None]).sum(dim=(0, 2)), quadratic_form(self.matrix, to_rows(mixed))

    def parts(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Parts:
        mixed = _mix(values, weights)
        with_mixed = (self.matrix @ to_rows(mixed)).unflatten(1, (len(mixed), -1)).transpose(0, 1)
        return mixed, targets[:, None], with_mixed

    def fractions_of(self, parts: Parts) -> tuple[Tensor, Tensor]:
        mixed, targets, with_mixed = parts
        return (mixed * targets).sum(dim=(0, 2)), (mixed * with_mixed).sum(dim=(0, 2))

    def slope(self, parts: Parts, ratio: Tensor) -> Kept:
        mixed, targets, with_mixed = parts
        return mixed, torch.addcmul(targets, with_mixed, ratio[:, None], value=-1, out=with_mixed)

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        kept: Kept,
        ratio: Tensor,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        assert weights is not None
        mixed, slope = kept
        by_head = values.shape[:2]
        low = torch.mul(slope, upstream[:, None], out=slope.new_empty(mixed.shape, dtype=values.dtype)).flatten(0, 1)
        of_values = product(weights.to(low.dtype).flatten(0, 1), low.transpose(1, 2))
        gradients.values.add_(of_values.unflatten(0, by_head))
        gradients.targets.add_((mixed * upstream[:, None]).sum(dim=1))
        left, right = to_rows(mixed * (-0.5 * ratio * upstream)[:, None]), to_rows(mixed)
        for block, rest in upper_blocks(len(self.matrix)):
            gradients.matrix[block, rest] += torch.tensordot(left[:, block], right[:, rest], dims=([0, 2], [0, 2]))
        of_weights = product(values.flatten(0, 1), low).unflatten(0, by_head)  # [M, n, K, t]
        return attention_backward(weights, of_weights).to(values.dtype)


def _agreement(values: Tensor, targets: Tensor) -> Tensor:
    """Return v_ikm . (W_O^T t_j)_m [M, n, K, t] in the dtype of `values`; elementwise steps widen it as they read."""
    return torch.bmm(values.flatten(1, 2), targets).unflatten(1, values.shape[1:3])


def _heads_first(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [n, M, K, t] times `factor` [n, t] as [M, n, K, t] in `dtype`: one visit."""
    x = x.transpose(0, 1)
    return torch.mul(x, factor[:, None], out=x.new_empty(x.shape, dtype=dtype))


def _mix(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mixed values [M, n, d, t] in full precision, of values [M, n, K, d] and weights [M, n, K, t]."""
    mixed = product(values.transpose(2, 3).flatten(0, 1), weights.to(values.dtype).flatten(0, 1))
    return mixed.unflatten(0, values.shape[:2])


GRAM_FORMS: dict[str, type[GramForm]] = {"image_gram": ImageGram, "shared_gram": SharedGram}
"""Form -> what computes a tile of it."""
