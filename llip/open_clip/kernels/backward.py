"""The backward kernel: what the gradient products read, of one image and BT texts per tile.

Shapes: n images and t texts of one call, K mixture tokens, M heads, d width of a head of keys, e of values, R = MK.

    keys [M, n, K, d]      values [M, n, K, e]      queries [t, M d]      targets [t, M e]
    gram G_i / g_i [n, R, R], gram_scale g_i [n]: its largest entry, so no dtype overflows
    upstream g = dL/ds, numerators c, squares |z|^2 [n, t], all with the rows of `upstream`
    rows first    weights a, norm_slopes [n, t, R]
    heads first   logit_slopes, value_slopes [M, t, n K]

With r = 1 / |z|, w = g r and x_mk = d s / (r d a_mk) = T_m V_m^T - c r^2 a G (c r^2 = 0 where the floor holds):

    for each head m:
        columns m of weights = softmax over K of Q_m K_m^T
    barrier
    for each head m:
        x = T_m V_m^T - c r^2 (a G)_m                                       [t, K]
        logit_slopes_m = w a (x - sum over K of a x)                        dQ_m = it K_m, dK_m = it^T Q_m
        value_slopes_m = w a                                                dT_m = it V_m, dV_m = it^T T_m
        columns m of norm_slopes = -1/2 c r^2 g_i w a                       g_i dG_i = it^T a

The products are cuBLAS's (`launch`). Nothing is added up by atomics: the same bits each time.
"""

import triton
import triton.language as tl

from llip.open_clip.kernels.parts import attention, gram_product, head_product, load_weights, lower, tile_place


@triton.jit(do_not_specialize=["images", "texts", "row_length"])  # they would be constants where they are 1
def slopes_kernel(
    keys, values, queries, targets, gram, gram_scale, upstream, numerators, squares,
    weights, norm_slopes, logit_slopes, value_slopes, images, texts, row_length,
    M: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """See the module."""
    R: tl.constexpr = M * K
    dtype: tl.constexpr = weights.dtype.element_ty
    tokens, rows = tl.arange(0, KP), tl.arange(0, BT)
    token_ok = tokens < K
    image, first = tile_place(tl.program_id(0), images, texts, BT, GROUP)
    row_ok = first + rows < texts
    ok = row_ok[:, None] & token_ok[None, :]
    query, target = queries + first.to(tl.int64) * M * D, targets + first.to(tl.int64) * M * E
    key, value = keys + image * K * D, values + image * K * E
    row_place = (image * texts + first) * R  # of arrays with rows first
    weights += row_place
    norm_slopes += row_place
    for m in range(M):
        token_rows = m * images.to(tl.int64) * K
        logits = head_product(
            query + m * D, key + token_rows * D, rows, row_ok, tokens, M * D, K, D, CHUNK, PRECISION, EMULATE
        )
        a = lower(attention(logits, tokens, K), dtype, EMULATE)
        tl.store(weights + rows[:, None] * R + (m * K + tokens)[None, :], a, mask=ok)
    tl.debug_barrier()

    place = image * row_length + first + rows
    square = tl.load(squares + place, mask=row_ok, other=1.0)
    inverse = tl.rsqrt(tl.maximum(square, FLOOR))
    numerator = tl.load(numerators + place, mask=row_ok, other=0.0)
    # c r^2 for the Gram matrix as it is given
    ratio = tl.where(square < FLOOR, 0.0, numerator * inverse * inverse) * tl.load(gram_scale + image)
    w = inverse * tl.load(upstream + place, mask=row_ok, other=0.0)
    all_weights = load_weights(weights, rows, row_ok, tl.arange(0, PART), R)
    for m in range(M):
        token_rows = m * images.to(tl.int64) * K
        columns = m * K + tokens
        product = gram_product(
            weights, all_weights, gram + image * R * R, rows, row_ok, columns, token_ok, R, PART, PRECISION, EMULATE
        )
        agreement = head_product(
            target + m * E, value + token_rows * E, rows, row_ok, tokens, M * E, K, E, VALUE_CHUNK, PRECISION, EMULATE
        )
        x = agreement - ratio[:, None] * product
        a = tl.load(weights + rows[:, None] * R + columns[None, :], mask=ok, other=0.0).to(tl.float32)
        # rounded weights do not sum to one; divided by their sum, the slopes of a head's logits sum to zero still
        mean = tl.sum(a * x, axis=1) / tl.maximum(tl.sum(a, axis=1), FLOOR)
        weighted = a * w[:, None]
        head_place = ((m * texts.to(tl.int64) + first) * images + image) * K
        by_head = head_place + rows[:, None] * images * K + tokens[None, :]
        tl.store(logit_slopes + by_head, lower(weighted * (x - mean[:, None]), dtype, EMULATE), mask=ok)
        tl.store(value_slopes + by_head, lower(weighted, dtype, EMULATE), mask=ok)
        norm_slope = weighted * (-0.5 * ratio)[:, None]
        tl.store(norm_slopes + rows[:, None] * R + columns[None, :], lower(norm_slope, dtype, EMULATE), mask=ok)
