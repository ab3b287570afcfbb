"""The forward kernel: scores of one image and BT texts per tile, without anything of size B x T x K in memory.

Shapes: B images, T texts, K mixture tokens, M heads, d width of a head of keys, e of values (d, but for FLAIR), R = MK.

    keys [M, B, K, d]      values [M, B, K, e]      queries [T, M d]      targets W_O^T t_j [T, M e]
    gram G_i / g_i [B, R, R], symmetric, with g_i [B] its largest entry: float16 has the range for it then
    scratch [programs, BT, R]      scores, numerators c, squares |z|^2 [B, T], all with the rows of `scores`

Each program takes one tile after another (there are as many programs as run at once, so `scratch` stays in L2):

    for each head m:
        a_m = softmax over K of Q_m K_m^T                          [BT, K] in float32, in registers
        c  += sum over K of a_m * (T_m V_m^T)                      [BT]
        columns m of scratch = a_m
    barrier
    for each BC columns of G:
        |z|^2 += sum over the columns of (a G) * a                 a from scratch
    s = c / |z|
"""

import triton
import triton.language as tl

from llip.open_clip.kernels.parts import attention, gram_product, head_product, load_weights, tile_place


@triton.jit(do_not_specialize=["images", "texts", "row_length"])  # they would be constants where they are 1
def scores_kernel(
    keys, values, queries, targets, gram, gram_scale, scratch, scores, numerators, squares,
    images, texts, row_length,
    M: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, FLOOR: tl.constexpr, TRAINING: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """See the module; numerators and squares are written if TRAINING."""
    R: tl.constexpr = M * K
    tokens, rows = tl.arange(0, KP), tl.arange(0, BT)
    weights = scratch + tl.program_id(0).to(tl.int64) * BT * R
    for tile in range(tl.program_id(0), images * tl.cdiv(texts, BT), tl.num_programs(0)):
        image, first = tile_place(tile, images, texts, BT, GROUP)
        row_ok = first + rows < texts
        query, target = queries + first.to(tl.int64) * M * D, targets + first.to(tl.int64) * M * E
        key, value = keys + image * K * D, values + image * K * E
        numerator = tl.zeros([BT], tl.float32)
        for m in range(M):
            token_rows = m * images.to(tl.int64) * K
            logits = head_product(
                query + m * D, key + token_rows * D, rows, row_ok, tokens, M * D, K, D, CHUNK, PRECISION, EMULATE
            )
            a = attention(logits, tokens, K)
            agreement = head_product(
                target + m * E,
                value + token_rows * E,
                rows,
                row_ok,
                tokens,
                M * E,
                K,
                E,
                VALUE_CHUNK,
                PRECISION,
                EMULATE,
            )
            numerator += tl.sum(a * agreement, axis=1)
            column = (m * K + tokens)[None, :]
            tl.store(weights + rows[:, None] * R + column, a.to(scratch.dtype.element_ty), mask=(tokens < K)[None, :])
        tl.debug_barrier()

        matrix = gram + image * R * R
        all_weights = load_weights(weights, rows, row_ok, tl.arange(0, PART), R)
        square = tl.zeros([BT], tl.float32)
        for start in range(0, R, BC):
            columns = start + tl.arange(0, BC)
            product = gram_product(
                weights, all_weights, matrix, rows, row_ok, columns, columns < R, R, PART, PRECISION, EMULATE
            )
            square += tl.sum(product * load_weights(weights, rows, row_ok, columns, R), axis=1)
        tl.debug_barrier()  # before the next tile writes to scratch

        square *= tl.load(gram_scale + image)
        place = image * row_length + first + rows
        tl.store(scores + place, numerator * tl.rsqrt(tl.maximum(square, FLOOR)), mask=row_ok)
        if TRAINING:
            tl.store(numerators + place, numerator, mask=row_ok)
            tl.store(squares + place, square, mask=row_ok)
