"""What the forward and the backward kernel share: one tile is one image against BT texts, texts as rows.

Shapes: B images, T texts, K mixture tokens, KP = K padded to a power of two, M heads, d width of a head, R = MK.
Constants of a kernel are written in capitals. PRECISION is that of products of float32; EMULATE is for bfloat16 in
Triton's interpreter, which multiplies its bits as integers and cuts off those that others round.
"""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """Return total + left right in float32."""
    if EMULATE:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def lower(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Return float32 numbers rounded to a dtype."""
    if EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile_place(tile, images, texts, BT: tl.constexpr, GROUP: tl.constexpr):
    """Return image and first text of a tile, in the order that reads memory least.

    GROUP images meet all texts before the next ones do: what is read of them stays in the L2 cache.
    """
    per_group = GROUP * tl.cdiv(texts, BT)
    first = tile // per_group * GROUP
    members = min(images - first, GROUP)
    within = tile % per_group
    return (first + within % members).to(tl.int64), within // members * BT


@triton.jit
def head_product(
    by_text, of_image, rows, row_ok, tokens, row_length,
    K: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Return the products of one head [BT, KP]: rows of texts [BT, SIZE] with tokens of the image [K, SIZE]."""
    total = tl.zeros([rows.shape[0], tokens.shape[0]], tl.float32)
    for start in range(0, SIZE, CHUNK):
        c = start + tl.arange(0, CHUNK)
        row = tl.load(
            by_text + rows[:, None] * row_length + c[None, :], mask=row_ok[:, None] & (c < SIZE)[None, :], other=0.0
        )
        token = tl.load(
            of_image + tokens[None, :] * SIZE + c[:, None], mask=(tokens < K)[None, :] & (c < SIZE)[:, None], other=0.0
        )
        total = dot(row, token, total, PRECISION, EMULATE)
    return total


@triton.jit
def attention(logits, tokens, K: tl.constexpr):
    """Return the softmax over K of KP logits [BT, KP]; the padding has the weight 0."""
    logits = tl.where((tokens < K)[None, :], logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def load_weights(weights, rows, row_ok, columns, R: tl.constexpr):
    """Return columns of weights that lie in memory as rows of R: [BT, columns]."""
    mask = row_ok[:, None] & (columns < R)[None, :]
    return tl.load(weights + rows[:, None] * R + columns[None, :], mask=mask, other=0.0)


@triton.jit
def gram_product(
    weights, all_weights, gram, rows, row_ok, columns, column_ok,
    R: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Return columns of a G [BT, columns], the sum over R in parts; G [R, R] is symmetric and read by rows.

    Args:
        weights: where a lies in memory, as rows of R.
        all_weights: the same, loaded, where one part has all of it.
    """
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, R, PART):
        r = start + tl.arange(0, PART)
        mask = (r < R)[:, None] & column_ok[None, :]
        matrix = tl.load(gram + columns[None, :] * R + r[:, None], mask=mask, other=0.0)
        if PART >= R:
            total = dot(all_weights, matrix, total, PRECISION, EMULATE)
        else:
            total = dot(load_weights(weights, rows, row_ok, r, R), matrix, total, PRECISION, EMULATE)
    return total
