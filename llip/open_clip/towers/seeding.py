"""K rows from a source's one row, and position embeddings for another image size.

Shapes: K mixture tokens, L patches, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SEED_SPREAD = 0.01
"""Copies of one token differ by this share of its root mean square."""


def copy_rows(rows: Tensor, count: int, spread: float) -> tuple[Tensor, Tensor]:
    """Make `count` token rows of a source's [R, W]: its own first, then copies of row 0 with seeded differences.

    Args:
        rows: the class token, then any registers.
        count: K, at least R.
        spread: standard deviation of the differences, as a share of the root mean square of row 0.

    Returns:
        (rows [K, W], how many tokens are copies of the same source row, itself included [K]).
    """
    extra = count - len(rows)
    assert extra >= 0, f"{count} rows of {len(rows)}"
    noise = torch.randn(extra, rows.shape[1], generator=torch.Generator().manual_seed(0))
    size = spread * rows[0].float().pow(2).mean().sqrt()
    copies = rows[:1].expand(extra, -1) + (size * noise).to(rows.dtype)
    counts = torch.ones(count)
    counts[0] += extra
    counts[len(rows) :] += extra
    return torch.cat([rows, copies]), counts


def resize_grid(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate position rows of a square grid of patches [L, W] to another grid [H W, W] (bicubic, antialiased)."""
    side = math.isqrt(len(rows))
    assert side * side == len(rows), f"{len(rows)} rows are no square"
    image = rows.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(rows.dtype)


def split_positions(rows: Tensor, token_rows: tuple[int, ...], patches: int) -> int | None:
    """Return how many of the position rows [P + L', W] belong to tokens rather than to patches, None if unclear.

    Args:
        rows: the source's position embedding.
        token_rows: numbers of token rows that the source may have, the likelier first.
        patches: L of the model: a source of the same image size is recognised by it.
    """
    fits = [count for count in token_rows if len(rows) - count == patches]
    squares = [
        count for count in token_rows if len(rows) > count and math.isqrt(len(rows) - count) ** 2 == len(rows) - count
    ]
    return next(iter(fits + squares), None)


def fit_positions(
    rows: Tensor, source_tokens: tuple[int, ...], tokens: int, grid: tuple[int, int]
) -> tuple[Tensor, str | None]:
    """Make position rows of K tokens and a grid of patches from a source's.

    Args:
        rows: the source's [P + L', W].
        source_tokens: what P may be, the likelier first. The rows of extra tokens are row 0 again; with P = 0 there
            are none to make.
        tokens: K, or 0 where tokens have no positions.
        grid: of the model's patches.

    Returns:
        ([K + L, W], what was resized). Rows that do not fit come back unchanged: the shape check reports them.
    """
    patches = grid[0] * grid[1]
    count = split_positions(rows, source_tokens, patches)
    if count is None or count > tokens:
        return rows, None
    head, rest = rows[:count], rows[count:]
    note = None
    if len(rest) != patches:
        side = math.isqrt(len(rest))
        rest = resize_grid(rest, grid)
        note = f"position embeddings interpolated from {side} x {side} to {grid[0]} x {grid[1]} patches"
    extra = tokens - count if count else 0
    return torch.cat([head, rows[:1].expand(extra, -1), rest]), note
