"""Gram matrices and quadratic forms, through the upper block triangle where symmetry allows it.

Shapes: B images, K mixture tokens, M heads, D embedding width, d = D / M, R rows of a symmetric matrix.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_TRIANGLE_BLOCK = 128  # rows of one block of the upper block triangle
_WRITES_FLOAT = {"meta"} if torch.version.cuda is None else {"meta", "cuda"}
"""Devices whose products of bfloat16 or float16 can have a float32 result (not on AMD)."""


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32; float64 stays, so that the same code can be checked against itself in double."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which operations on `device` keep the dtypes of their inputs; on "meta" they always do."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right [b, i, j] in full precision, of [b, i, k] and [b, k, j] in a common dtype.

    Products of low precision are exact in float32, and so are sums of them to rounding; only a result in low precision
    would lose digits. CUDA's matrix units write float32 directly.
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.bmm(left, right)
    if left.device.type in _WRITES_FLOAT:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


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
    total = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    for block, rest in upper_blocks(x.shape[1]):
        total += (doubled[..., block, rest] @ x[:, rest]).mul_(x[:, block]).sum(dim=1)
    return total


def _head_columns(values: Tensor, shared: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield what the block column of head n of the Gram matrices is made of: n, its columns, S_mn and V_m S_mn.

    The heads m <= n alone, S_mn being [n+1, d, e] and V_m S_mn [B, (n+1)K, e].
    """
    heads, images, tokens, size = values.shape
    blocks = shared.view(heads, size, heads, size)
    for head in range(heads):
        factor = blocks[: head + 1, :, head]
        left = torch.bmm(values[: head + 1].flatten(1, 2), factor)  # [n+1, BK, e]
        left = left.unflatten(1, (images, tokens)).transpose(0, 1).flatten(1, 2)
        yield head, slice(head * tokens, (head + 1) * tokens), factor, left


def image_gram(values: Tensor, shared: Tensor) -> Tensor:
    """Return G_i = P_i P_i^T [B, MK, MK] ("image Gram" in docs/method.md).

    With V_m the values of head m and S_mn the blocks of W_O^T W_O, G_mn = V_m S_mn V_n^T for each image:

        G = einsum("mbkd,mdne,nble->bmknl", V, S, V)

    One block column of the upper triangle at a time, mirrored below the diagonal.

    Args:
        values: of the mixture tokens [M, B, K, d], in full precision.
        shared: W_O^T W_O [D, D].
    """
    heads, images, tokens, _ = values.shape
    gram = values.new_empty(images, heads * tokens, heads * tokens)
    for head, columns, _, left in _head_columns(values, shared):
        upper = torch.bmm(left, values[head].transpose(1, 2))  # [B, (n+1)K, K]
        gram[:, : columns.stop, columns] = upper
        gram[:, columns, : columns.start] = upper[:, : columns.start].transpose(1, 2)
    return gram


def image_gram_backward(values: Tensor, shared: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `image_gram` with respect to `values` [M, B, K, d] and `shared` [D, D].

    With dG and S symmetric,

        dV = 2 einsum("bmknl,mdne,nble->mbkd", dG, S, V)
        dS = einsum("mbkd,bmknl,nble->mdne", V, dG, V)

    As in `image_gram`, only the upper triangle of dG is visited: U holds each of its entries above the diagonal twice,
    for its mirror image. So dS is right up to an antisymmetric part, which has no effect because S is symmetric.

    Args:
        values, shared: as given to `image_gram`.
        gradient: dG [B, MK, MK], of which only the upper triangle is read.
    """
    heads, images, tokens, size = values.shape
    of_values, of_shared = torch.zeros_like(values), torch.zeros_like(shared)
    blocks = of_shared.view(heads, size, heads, size)
    for head, columns, factor, left in _head_columns(values, shared):
        upper = 2 * gradient[:, : columns.stop, columns]  # U [B, (n+1)K, K]
        diagonal = upper[:, columns]
        diagonal.copy_((diagonal.triu() + diagonal.triu(1)) / 2)
        of_values[head] += torch.bmm(upper.transpose(1, 2), left)  # through V_n
        of_left = torch.bmm(upper, values[head]).unflatten(1, (head + 1, tokens)).transpose(0, 1)
        of_left = of_left.flatten(1, 2)  # [n+1, BK, e]
        through_left = torch.bmm(of_left, factor.transpose(1, 2))
        of_values[: head + 1] += through_left.view(head + 1, images, tokens, size)  # through V_m
        blocks[: head + 1, :, head] = torch.bmm(values[: head + 1].flatten(1, 2).transpose(1, 2), of_left)
    return of_values, of_shared
