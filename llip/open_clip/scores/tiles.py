"""The scores of one tile of pairs and their gradients, in the two forms with a Gram matrix (see `similarity`).

Shapes: n images and t texts of the tile, K mixture tokens, M heads, D embedding width, d = D / M, R = MK.
Heads come first and texts last, [M, n, K, t]: products over heads need no copies, and softmax runs over contiguous
texts. "Rows" are the same numbers as [n, MK, t], a view when n = 1.

Each form keeps what its `backward` needs, beside the attention weights, in a tuple. Scores are s = c r with c the
numerator and r = 1 / |z|; the quadratic form |z|^2 = x^T S x of a symmetric S has the gradient 2 S x, whose product was
formed for the norm already.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llip.open_clip.scores.gram import doubled_above_diagonal, full_precision, quadratic_form, upper_blocks

MIN_SQUARED_NORM = 1e-12
"""Floor under |z|^2 before the root: the quadratic form cancels, and degenerate tokens give zero."""

Kept = tuple[Tensor, ...]


class Gradients(NamedTuple):
    """Sums over tiles, in full precision, that the backward pass of a tile adds to."""

    values: Tensor  # [M, n, K, d]
    targets: Tensor  # [M, d, t]
    matrix: Tensor  # like the matrix of the form, its upper block triangle alone


def to_rows(x: Tensor) -> Tensor:
    """[M, n, K, t] -> [n, MK, t]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3])


def from_rows(x: Tensor, heads: int) -> Tensor:
    """[n, MK, t] -> [M, n, K, t]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of `left` [b, i, k] and `right` [b, k, j] to `total` [b, i, j], which has full precision."""
    if left.dtype == right.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        lower = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
        total.add_(torch.bmm(left.to(lower), right.to(lower)))


def attention(keys: Tensor, queries: Tensor) -> Tensor:
    """Return the weights over the mixture tokens [M, n, K, t] from keys [M, n, K, d] and queries [M, d, t]."""
    logits = torch.bmm(keys.flatten(1, 2), queries).unflatten(1, keys.shape[1:3])
    return full_precision(logits).softmax(dim=2)


def attention_backward(weights: Tensor, gradient: Tensor) -> Tensor:
    """Turn the gradient of the weights, already times the weights, into that of the logits, in place."""
    return gradient.addcmul_(weights, gradient.sum(dim=2, keepdim=True), value=-1)


def inverse_norm(squared: Tensor) -> Tensor:
    """Return r = 1 / |z| of squared norms."""
    return squared.clamp_min(MIN_SQUARED_NORM).rsqrt()


def _norm_slope(numerator: Tensor, squared: Tensor, inverse: Tensor) -> Tensor:
    """Return c r^2, the weight of S x in the slope of the score; zero where the floor holds, as a constant's is."""
    return (numerator * inverse.square()).masked_fill(squared < MIN_SQUARED_NORM, 0)


class GramForm:
    """One of the two ways to the norm through symmetric matrices; what they share."""

    kept_tensors: int
    """Tensors that `forward` keeps for `backward`."""
    keeps_weights: bool
    """The attention weights are kept too; otherwise they are computed again."""

    def __init__(self, matrix: Tensor, training: bool) -> None:
        """Hold the Gram matrix or matrices; without `training` in the form that `scores` needs."""
        self.matrix = matrix if training else doubled_above_diagonal(matrix)

    def scores(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the scores [n, t], without gradients.

        Args:
            images: the tile's images among those of the matrices.
            values: [M, n, K, d].
            targets: W_O^T t_j [M, d, t].
            weights: attention weights [M, n, K, t].
        """
        raise NotImplementedError

    def forward(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Kept]:
        """Return the scores [n, t], and what `backward` needs."""
        raise NotImplementedError

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor,
        kept: Kept,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        """Return the gradient of the logits [M, n, K, t], given that of the scores; add the others to `gradients`."""
        raise NotImplementedError


class ImageGram(GramForm):
    """|z|^2 = a^T G_i a with one Gram matrix [R, R] per image: z has D numbers and is never formed.

    Keeps (slope of the logits, r, c r^2); the slope is d s / d logits over r.
    """

    kept_tensors = 3
    keeps_weights = True

    def scores(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        agreement = full_precision(torch.bmm(values.flatten(1, 2), targets)).view_as(weights)
        numerator = agreement.mul_(weights).sum(dim=(0, 2))
        return numerator * inverse_norm(quadratic_form(self.matrix[images], to_rows(weights)))

    def forward(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Kept]:
        slope = full_precision(torch.bmm(values.flatten(1, 2), targets)).view_as(weights).mul_(weights)
        product = from_rows(torch.bmm(self.matrix[images], to_rows(weights)), len(weights)).mul_(weights)
        numerator, squared = slope.sum(dim=(0, 2)), product.sum(dim=(0, 2))
        inverse = inverse_norm(squared)
        ratio = _norm_slope(numerator, squared, inverse)
        slope.addcmul_(product, ratio[:, None], value=-1)
        return numerator * inverse, (attention_backward(weights, slope), inverse, ratio)

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor,
        kept: Kept,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        slope, inverse, ratio = kept
        upstream = upstream * inverse
        weighted = weights * upstream[:, None]  # [M, n, K, t]
        accumulate(gradients.values.flatten(1, 2), weighted.flatten(1, 2), targets.transpose(1, 2))
        accumulate(gradients.targets, values.flatten(1, 2).transpose(1, 2), weighted.flatten(1, 2))
        left, right = to_rows(weighted.mul_(-0.5 * ratio[:, None])), to_rows(weights).transpose(1, 2)
        of_matrix = gradients.matrix[images]
        for block, rest in upper_blocks(left.shape[1]):
            of_matrix[:, block, rest].baddbmm_(left[:, block], right[:, :, rest])
        return slope * upstream[:, None]


class SharedGram(GramForm):
    """|z|^2 = m^T (W_O^T W_O) m of the mixed values m [D] of a pair: one Gram matrix [D, D] for all of them.

    Keeps (mixed values, slope of the mixed values over r, r, c r^2): 2 D numbers per pair, where the weights would be
    M K more. This form is for many tokens, and its weights cost one product to compute again.
    """

    kept_tensors = 4
    keeps_weights = False

    def scores(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        mixed = _mix(values, weights)
        numerator = (mixed * targets[:, None]).sum(dim=(0, 2))
        return numerator * inverse_norm(quadratic_form(self.matrix, to_rows(mixed)))

    def forward(self, images: slice, values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Kept]:
        mixed = _mix(values, weights)  # [M, n, d, t]
        product = from_rows(self.matrix @ to_rows(mixed), len(values))
        numerator, squared = (mixed * targets[:, None]).sum(dim=(0, 2)), (mixed * product).sum(dim=(0, 2))
        inverse = inverse_norm(squared)
        ratio = _norm_slope(numerator, squared, inverse)
        slope = torch.addcmul(full_precision(targets)[:, None], product, ratio[:, None], value=-1)
        return numerator * inverse, (mixed, slope, inverse, ratio)

    def backward(
        self,
        images: slice,
        values: Tensor,
        targets: Tensor,
        weights: Tensor,
        kept: Kept,
        upstream: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        mixed, slope, inverse, ratio = kept
        upstream = upstream * inverse
        low = (slope * upstream[:, None]).to(values.dtype)
        gradients.values.add_(torch.matmul(weights.to(low.dtype), low.transpose(2, 3)))
        weighted = mixed * upstream[:, None]
        gradients.targets.add_(weighted.sum(dim=1))
        left, right = to_rows(weighted.mul_(-0.5 * ratio[:, None])), to_rows(mixed)
        for block, rest in upper_blocks(len(self.matrix)):
            gradients.matrix[block, rest] += torch.tensordot(left[:, block], right[:, rest], dims=([0, 2], [0, 2]))
        gradient = full_precision(torch.matmul(values, low))  # [M, n, K, t]
        return attention_backward(weights, gradient.mul_(weights))


def _mix(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mixed values [M, n, d, t] in full precision, of values [M, n, K, d] and weights [M, n, K, t]."""
    return full_precision(torch.matmul(values.transpose(2, 3), weights.to(values.dtype)))


GRAM_FORMS: dict[str, type[GramForm]] = {"image_gram": ImageGram, "shared_gram": SharedGram}
"""Form -> what computes a tile of it."""
