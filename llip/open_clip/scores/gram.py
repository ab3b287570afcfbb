"""Gram matrices and quadratic forms, through the upper block triangle where symmetry allows it.

Shapes: B images, K mixture tokens, M heads, D embedding width, d = D / M, R rows of a symmetric matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TRIANGLE_BLOCK = 128  # rows of one block of the upper block triangle


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32; float64 stays, so that the same code can be checked against itself in double."""
    return x if x.dtype == torch.float64 else x.float()


def upper_blocks(rows: int) -> list[tuple[slice, slice]]:
    """Return (block of rows, columns from that block on) that cover the upper block triangle of [R, R]."""
    starts = range(0, rows, _TRIANGLE_BLOCK)
    return [(slice(start, start + _TRIANGLE_BLOCK), slice(start, rows)) for start in starts]


def doubled_above_diagonal(matrix: Tensor) -> Tensor:
    """Return a copy of a symmetric [..., R, R] that is doubled off its diagonal blocks."""
    doubled = 2 * matrix
    for block, _ in upper_blocks(matrix.shape[-1]):
        doubled[..., block, block] = matrix[..., block, block]
    return doubled


def quadratic_form(doubled: Tensor, x: Tensor) -> Tensor:
    """Return x^T S x [n, t] of x [n, R, t], from `doubled_above_diagonal(S)`: 62 % of the products at R = 512."""
    total = x.new_zeros(x.shape[0], x.shape[2])
    for block, rest in upper_blocks(x.shape[1]):
        total += (x[:, block] * (doubled[..., block, rest] @ x[:, rest])).sum(dim=1)
    return total


def _left_factors(values: Tensor, shared: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield m', H_mm' [m'+1, d, d'] and v_m H_mm' [B, (m'+1)K, d'] of the heads m <= m', for each head m'."""
    heads, images, tokens, size = values.shape
    shared = shared.view(heads, size, heads, size)
    for head in range(heads):
        factor = shared[: head + 1, :, head]
        left = torch.bmm(values[: head + 1].flatten(1, 2), factor)  # [m'+1, BK, d']
        yield head, factor, left.unflatten(1, (images, tokens)).transpose(0, 1).flatten(1, 2)


def image_gram(values: Tensor, shared: Tensor) -> Tensor:
    """Return G_i = P_i P_i^T [B, MK, MK], whose blocks are v_im (W_O^T W_O)_mm' v_im'^T.

    Args:
        values: of the mixture tokens [M, B, K, d], in full precision.
        shared: W_O^T W_O [D, D].
    """
    heads, images, tokens, _ = values.shape
    gram = values.new_empty(images, heads * tokens, heads * tokens)
    for head, _, left in _left_factors(values, shared):
        columns = slice(head * tokens, (head + 1) * tokens)
        upper = torch.bmm(left, values[head].transpose(1, 2))  # [B, (m'+1)K, K]
        gram[:, : columns.stop, columns] = upper
        gram[:, columns, : columns.start] = upper[:, : columns.start].transpose(1, 2)
    return gram


def image_gram_backward(
    values: Tensor, shared: Tensor, gradient: Tensor, values_total: Tensor, shared_total: Tensor
) -> None:
    """Add the gradients of `image_gram` to those of `values` and `shared`.

    Args:
        values, shared: as given to `image_gram`.
        gradient: of the symmetric matrices [B, MK, MK], symmetric as well; only its upper triangle is read.
        values_total, shared_total: added to, shaped like `values` and `shared`; that of `shared` is right up to an
            antisymmetric part, which does not matter because `shared` is symmetric.
    """
    heads, images, tokens, size = values.shape
    shared_total = shared_total.view(heads, size, heads, size)
    for head, factor, left in _left_factors(values, shared):
        columns = slice(head * tokens, (head + 1) * tokens)
        upper = 2 * gradient[:, : columns.stop, columns]  # above the diagonal: for its mirror image too
        square = upper[:, columns]
        upper[:, columns] = (square.triu() + square.triu(1)) / 2
        values_total[head] += torch.bmm(upper.transpose(1, 2), left)
        left_gradient = torch.bmm(upper, values[head])  # [B, (m'+1)K, d']
        left_gradient = left_gradient.unflatten(1, (head + 1, tokens)).transpose(0, 1).flatten(1, 2)  # [m'+1, BK, d']
        values_total[: head + 1] += torch.bmm(left_gradient, factor.transpose(1, 2)).view(
            head + 1, images, tokens, size
        )
        shared_total[: head + 1, :, head] += torch.bmm(values[: head + 1].flatten(1, 2).transpose(1, 2), left_gradient)
