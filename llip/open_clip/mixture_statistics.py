"""Measures of mixture tokens, weights and features: pure functions of tensors.

Shapes: B images, T texts, M heads, K mixture tokens, D embedding width, N features.
"""

import torch
from torch import Tensor

from llip.open_clip.model import Llip
from llip.open_clip.pooling import unit_norm

MOST_IMAGES, MOST_TEXTS = 32, 32
"""Images and texts that `mixture_measures` looks at: enough for a curve, and milliseconds at any size of model."""


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of distributions [..., K]."""
    return torch.special.entr(weights).sum(dim=-1)


def effective_number(weights: Tensor) -> Tensor:
    """Return exp(entropy) of distributions [..., K]: 1 when all is on one token, K when it is spread evenly."""
    return entropy(weights).exp()


def token_usage(weights: Tensor) -> Tensor:
    """Return the share of all weight that each token gets [K], of weights [B, T, M, K]."""
    return weights.mean(dim=(0, 1, 2))


def grid_variances(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the variance of [B, T, F] over texts, over images, and over all pairs, each summed over F.

    Over texts: of the texts of one image, averaged over images. Over images: of the images of one text, averaged over
    texts. No correction for small samples.
    """
    over_texts = values.var(dim=1, correction=0).sum(dim=-1).mean()
    over_images = values.var(dim=0, correction=0).sum(dim=-1).mean()
    return over_texts, over_images, values.flatten(0, 1).var(dim=0, correction=0).sum()


def share(part: Tensor, other: Tensor) -> Tensor:
    """Return part / (part + other), 0 where both are zero to rounding."""
    total = part + other
    return torch.where(total > 1e-10, part / total.clamp_min(1e-10), torch.zeros_like(total))


def weight_text_share(weights: Tensor) -> Tensor:
    """Return the share of the variance of weights [B, T, M, K] that lies between texts of one image, 0 to 1."""
    over_texts, _, total = grid_variances(weights.flatten(2))
    return share(over_texts, total - over_texts)


def token_similarity(h: Tensor) -> Tensor:
    """Return the mean cosine of two different mixture tokens of one image, of [B, K, D]; 0 for K = 1."""
    tokens = h.shape[1]
    if tokens == 1:
        return h.new_zeros(())
    # sum over pairs = |sum of directions|^2 - K
    return ((unit_norm(h).sum(dim=1).square().sum(dim=-1) - tokens) / (tokens * (tokens - 1))).mean()


def spectrum(features: Tensor) -> Tensor:
    """Return the singular values of centred features [N, D] over sqrt(N), descending [min(N, D)].

    Their squares are the eigenvalues of the features' covariance.
    """
    centred = features - features.mean(dim=0)
    return torch.linalg.svdvals(centred) / len(features) ** 0.5


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return exp(entropy) of normalised singular values (Roy & Vetterli 2007); 0 when all are zero."""
    total = singular_values.sum()
    return torch.where(total > 0, effective_number(singular_values / total.clamp_min(1e-12)), torch.zeros_like(total))


@torch.no_grad()
def mixture_measures(model: Llip, h: Tensor, t: Tensor) -> dict[str, float]:
    """Return what to log of a training batch, from its first images and texts. Costs one short wait for the device.

    Args:
        model: not wrapped.
        h: mixture tokens [B, K, D], as `encode_image` gives them.
        t: unit-norm text features [T, D].

    Returns:
        usage_effective: effective number of tokens over the batch. usage_max: the largest share that one token gets.
        effective_per_pair: effective number of tokens in one head for one pair, averaged.
        weight_text_share, z_text_share: share of the variance (of the weights; of z) that lies between texts of one
        image. z_variance_over_texts, z_variance_over_images: see `grid_variances`. token_similarity: see there.
    """
    with torch.autocast(h.device.type, enabled=False):
        h, t = h[:MOST_IMAGES].detach().float(), t[:MOST_TEXTS].detach().float()
        weights, z = model.mixture_weights(h, t), model.contextualize(h, t)
        usage = token_usage(weights)
        over_texts, over_images, _ = grid_variances(z)
        values = {
            "usage_effective": effective_number(usage),
            "usage_max": usage.max(),
            "effective_per_pair": effective_number(weights).mean(),
            "weight_text_share": weight_text_share(weights),
            "z_variance_over_texts": over_texts,
            "z_variance_over_images": over_images,
            "z_text_share": share(over_texts, over_images),
            "token_similarity": token_similarity(h),
        }
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
