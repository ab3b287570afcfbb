"""Which shapes the kernels take, and their block sizes. No triton here: `llip plan` asks on any machine.

Shapes: K mixture tokens, M heads, d width of a head of keys, e of values, R = MK.
"""

from typing import NamedTuple

MOST_TOKENS, MOST_ROWS, MOST_SIZE = 128, 512, 256
GROUP = 16
"""Images that meet all texts before the next ones do: at G/14 their Gram matrices, keys and values take 14 MB of L2."""


class HeadShape(NamedTuple):
    """What the kernels are compiled for."""

    heads: int  # M
    tokens: int  # K
    key_size: int  # d
    value_size: int  # e: d, or d and what carries the bias of FLAIR's output
    itemsize: int  # bytes of a number of keys and values

    @property
    def rows(self) -> int:
        """R, of a Gram matrix."""
        return self.heads * self.tokens


def unsupported(shape: HeadShape) -> str | None:
    """Return why the kernels do not take a shape; None where they do."""
    if shape.itemsize > 4:
        return "float64"
    if shape.tokens > MOST_TOKENS:
        return f"{shape.tokens} tokens to attend to, more than {MOST_TOKENS}"
    if shape.rows > MOST_ROWS:
        return f"{shape.tokens} tokens x {shape.heads} heads, more than {MOST_ROWS}"
    if max(shape.key_size, shape.value_size) > MOST_SIZE:
        return f"heads of {max(shape.key_size, shape.value_size)} numbers, more than {MOST_SIZE}"
    return None


class Blocks(NamedTuple):
    """Block sizes of both kernels, all of them powers of two but for `stages`."""

    texts: int  # BT: rows of every product; wgmma takes 64 or more
    columns: int  # BC: of the Gram matrix at once, forward
    part: int  # of the sum over R
    chunk: int  # of the sum over d
    value_chunk: int  # of the sum over e
    warps: int = 8
    stages: int = 2  # of a loop's loads in flight


def power_of_two(n: int, least: int = 16) -> int:
    """Return the smallest power of two from `n` on; products of the tensor cores want 16 or more."""
    return max(least, 1 << (n - 1).bit_length())


def _chunk(size: int, most: int) -> int:
    """Return the largest power of two up to `most` that divides `size`; where that is below 16, the rest is masked."""
    return next((chunk for chunk in (64, 32, 16) if chunk <= most and size % chunk == 0), min(most, power_of_two(size)))


def choose_blocks(shape: HeadShape, hopper: bool) -> Blocks:
    """Return the block sizes of a shape: those of the largest tiles that compile without a spilled register.

    - float32: half the texts and half the chunks, since its numbers take twice the shared memory; without TF32 the
      products run on the CUDA cores, whose operands lie in registers.
    - K above 64: the softmax of 128 texts x 128 tokens and its gradient do not fit into registers.
    - R up to 256: all weights of a text are one operand, read once; beyond that they come from L2 in parts of 64.
    - Before Hopper, R above 256: products are mma.sync, whose operands take registers as well.

    Args:
        shape: of the head.
        hopper: compute capability 9.0 or later.
    """
    if shape.itemsize == 4:
        return Blocks(64, 32, 32, _chunk(shape.key_size, 32), _chunk(shape.value_size, 32))
    one_part = shape.rows <= 256
    texts = 128 if shape.tokens <= 64 and (hopper or one_part) else 64
    part = power_of_two(shape.rows) if one_part else 64
    columns = min(64, power_of_two(shape.rows))
    chunk, value_chunk = _chunk(shape.key_size, 64), _chunk(shape.value_size, 64)
    return Blocks(texts, columns, part, chunk, value_chunk, stages=3 if hopper and not one_part else 2)
