"""Exact scores of every image against every text under text-conditioned pooling, in tiles over texts and images.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.

Done plainly, each of the B x T pairs needs its own feature z (D numbers) and a D x D product. With the rows of
`P_i` [MK, D] being W_O^m v_ikm and `a_ij` [MK] the attention weights of a pair, z_ij = P_i^T a_ij, hence

    s_ij = (sum_mk a_ijmk v_ikm . (W_O^T t_j)_m) / |z_ij|

and the norm comes in three ways, all exact; the shape says which is the cheapest (`scores.plan`):

    image_gram    |z|^2 = a^T G_i a,              G_i = P_i P_i^T [MK, MK], once per image
    shared_gram   |z|^2 = m^T (W_O^T W_O) m,      m_ij = the mixed values sum_k a_ijmk v_ikm [D]
    features      |z|^2 = |W_O m|^2               z is formed: for so few pairs that no Gram matrix pays

A Gram matrix costs two products per pair in forward and backward together, where features cost three: the product that
gives the norm is its gradient as well. Nothing of size B x T x (K, M or D) stays unless the memory budget has room for
it: tiles that do not fit are computed again in the backward pass. Texts are projected tile by tile.
"""

import torch
from torch import Tensor

from llip.open_clip.kernels.blocks import HeadShape
from llip.open_clip.kernels.select import choose_kernel
from llip.open_clip.scores.eager import eager_scores
from llip.open_clip.scores.gram import full_precision, without_autocast
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import Form, plan_scores
from llip.open_clip.scores.tiles import attention, inverse_norm


def pairwise_scores(
    keys: Tensor,
    values: Tensor,
    texts: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    query_gain: float = 1.0,
    *,
    memory_budget: int | None = None,
    form: Form | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Return the scores z_ij . t_j of all pairs.

    Args:
        keys, values: of the images' mixture tokens [M, B, K, d]; their dtype is that of the large products.
        texts: unit-norm text features [T, D].
        query_weight, out_weight: W_Q and W_O [D, D].
        query_gain: factor of the queries, 1 / temperature included.
        memory_budget: bytes beyond inputs and result; None takes the default of `scores.plan`.
        form, tile: force the form, or the tile (images, texts) of eager; by default both follow from the shapes.

    Returns:
        Cosines [B, T] in float32, the same for any form and tile to rounding. Softmax, norms, Gram matrices and
        quadratic forms are float32 whatever the dtype of keys and values (float64 stays float64).
    """
    heads, images, tokens, size = keys.shape
    assert images * len(texts) > 0, f"no scores of {images} images and {len(texts)} texts"
    dtype = torch.promote_types(keys.dtype, values.dtype)
    keys, values = keys.to(dtype).contiguous(), values.to(dtype).contiguous()
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (keys, values, texts, query_weight, out_weight))
    shape = HeadShape(heads, tokens, size, values.shape[3], dtype.itemsize)
    plan = plan_scores(
        images, len(texts), tokens, heads, heads * size,
        training=training, on_cpu=keys.device.type == "cpu", budget=memory_budget, form=form, tile=tile,
        kernel=None if tile else choose_kernel(keys.device, dtype, shape), itemsize=dtype.itemsize,
    )  # fmt: skip
    with without_autocast(keys.device):
        if plan.form == "features":
            return _scores_of_features(keys, values, texts, query_gain, query_weight, out_weight)
        query_weight, out_weight = query_gain * full_precision(query_weight), full_precision(out_weight)
        inputs = ScoreInputs(keys, values, texts, query_weight, out_weight, out_weight.T @ out_weight)
        if plan.by_triton:
            from llip.open_clip.kernels.launch import kernel_scores

            return kernel_scores(inputs, plan, training)
        return eager_scores(inputs, plan, training)


def _scores_of_features(
    keys: Tensor, values: Tensor, texts: Tensor, query_gain: float, query_weight: Tensor, out_weight: Tensor
) -> Tensor:
    """Return the scores by forming every z: the plainest form, for few pairs."""
    low_texts, query_weight, out_weight = (x.to(keys.dtype) for x in (query_gain * texts, query_weight, out_weight))
    queries = (query_weight @ low_texts.T).unflatten(0, (len(keys), -1))  # [M, d, T]
    weights = attention(keys, queries).to(values.dtype)  # [M, B, K, T]
    mixed = torch.matmul(weights.transpose(2, 3), values)  # [M, B, T, d]
    z = full_precision(mixed.permute(1, 2, 0, 3).flatten(2) @ out_weight.T)  # [B, T, D]
    numerator = (z * full_precision(texts)).sum(dim=-1)
    return numerator * inverse_norm(z.square().sum(dim=-1))
