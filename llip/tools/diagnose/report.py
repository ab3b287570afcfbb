"""All measures of a model over collected features, as plain containers and as a table.

Shapes: B images, T captions, K mixture tokens, M heads, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from llip.open_clip.mixture_alarms import find_alarms
from llip.open_clip.mixture_statistics import (
    effective_number,
    effective_rank,
    entropy,
    grid_variances,
    share,
    spectrum,
    token_similarity,
    token_usage,
    weight_text_share,
)
from llip.open_clip.model import Llip
from llip.open_clip.pooling import TextFreePooling
from llip.tools.diagnose.collect import Collected

GRID_IMAGES, GRID_TEXTS = 128, 256
"""Images and texts of which all pairs are measured; evenly spread over those collected."""


def _spread(values: Tensor) -> dict[str, float]:
    """Return mean and quantiles of a vector."""
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "p05": low, "median": middle, "p95": high}


def _evenly(count: int, most: int) -> Tensor:
    """Return up to `most` of the indices below `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().unique()


def _own_features(model: Llip, collected: Collected, device: torch.device) -> Tensor:
    """Return z of each caption with its own image [T, D]."""
    parts = []
    for image, count in enumerate(torch.bincount(collected.owners).tolist()):
        texts = collected.t[collected.owners == image].to(device)
        assert len(texts) == count
        parts.append(model.contextualize(collected.h[image : image + 1].to(device), texts)[0].float().cpu())
    return torch.cat(parts)


def _variance_over_own(features: Tensor, owners: Tensor) -> float:
    """Return the variance of z over the captions of one image, averaged over images with several."""
    counts = torch.bincount(owners)
    means = torch.zeros(len(counts), features.shape[1]).index_add_(0, owners, features) / counts[:, None]
    within = torch.zeros(len(counts)).index_add_(0, owners, (features - means[owners]).square().sum(dim=1)) / counts
    return within[counts > 1].mean().item() if (counts > 1).any() else 0.0


@torch.no_grad()
def diagnose(model: Llip, collected: Collected) -> dict[str, Any]:
    """Return every measure, as docs/explain.md explains them, and the alarms."""
    device = next(model.parameters()).device
    h = collected.h[_evenly(len(collected.h), GRID_IMAGES)].to(device)
    t = collected.t[_evenly(len(collected.t), GRID_TEXTS)].to(device)
    weights, z = model.mixture_weights(h, t).float(), model.contextualize(h, t).float()
    usage, over_heads = token_usage(weights), weights.mean(dim=2)  # [K], [B, T, K]
    per_image, per_text = over_heads.mean(dim=1), over_heads.mean(dim=0)
    over_texts, over_images, _ = grid_variances(z)
    own = _own_features(model, collected, device)
    values, text_values = spectrum(own), spectrum(collected.t)
    scalars = {
        "usage_effective": effective_number(usage).item(),
        "usage_max": usage.max().item(),
        "effective_per_pair": effective_number(weights).mean().item(),
        "weight_text_share": weight_text_share(weights).item(),
        "z_variance_over_own_texts": _variance_over_own(own, collected.owners),
        "z_variance_over_texts": over_texts.item(),
        "z_variance_over_images": over_images.item(),
        "z_text_share": share(over_texts, over_images).item(),
        "token_similarity": token_similarity(h).item(),
        "rank": effective_rank(values).item(),
        "text_rank": effective_rank(text_values).item(),
    }
    pooling, tokens = model.config["pooling"], weights.shape[-1]
    return {
        "images": len(collected.h),
        "captions": len(collected.t),
        "mixture_tokens": model.config["mixture_tokens"],
        "pooling": pooling,
        "damage": collected.damage,
        **scalars,
        "usage": usage.tolist(),
        "entropy_per_image": _spread(entropy(per_image)),
        "entropy_per_text": _spread(entropy(per_text)),
        "effective_per_image": _spread(effective_number(per_image)),
        "effective_per_text": _spread(effective_number(per_text)),
        "pair_effective_numbers": effective_number(weights)
        .flatten()[:: max(1, weights[..., 0].numel() // 4096)]
        .tolist(),
        "singular_values": values.tolist(),
        "text_singular_values": text_values.tolist(),
        "alarms": find_alarms(
            scalars,
            tokens,
            not isinstance(model.pooling, TextFreePooling),
            min(own.shape),
            hasattr(model.pooling, "temperature"),
        ),
    }


def as_table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    tokens = report["mixture_tokens"]
    rows = [
        ("images, captions", f"{report['images']:,}, {report['captions']:,}"),
        ("pooling, mixture tokens", f"{report['pooling']}, {tokens}"),
        (
            "effective number of tokens",
            f"{report['usage_effective']:.2f} (largest share {100 * report['usage_max']:.1f} %)",
        ),
        ("tokens of one head and pair", f"{report['effective_per_pair']:.2f}"),
        ("tokens of one image", _interval(report["effective_per_image"])),
        ("tokens of one text", _interval(report["effective_per_text"])),
        ("similarity of tokens (cosine)", f"{report['token_similarity']:.3f}"),
        ("weights: share of variance over texts", f"{100 * report['weight_text_share']:.1f} %"),
        ("variance of z over texts true of an image", f"{report['z_variance_over_own_texts']:.4f}"),
        ("variance of z over all texts", f"{report['z_variance_over_texts']:.4f}"),
        ("variance of z over images", f"{report['z_variance_over_images']:.4f}"),
        ("effective rank, image features", f"{report['rank']:.1f} of {len(report['singular_values'])}"),
        ("effective rank, text features", f"{report['text_rank']:.1f} of {len(report['text_singular_values'])}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += [f"unusable: {reason}: {count:,}" for reason, count in report["damage"].items()]
    lines += [f"ALARM: {alarm}" for alarm in report["alarms"]] or ["no alarm"]
    return "\n".join(lines)


def _interval(values: dict[str, float]) -> str:
    return f"{values['mean']:.2f} (5 % to 95 %: {values['p05']:.2f} to {values['p95']:.2f})"
