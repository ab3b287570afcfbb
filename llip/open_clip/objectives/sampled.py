"""FLAIR's text-conditioned loss as published: an image meets its own N texts and one text of each other image.

Shapes: B images of this process, N captions per image, T = W B N texts of the global batch over W processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llip.open_clip.objectives.matches import Matches


def draw_texts(matches: Matches, device: torch.device) -> Tensor:
    """Draw the texts that each image meets [B, T], with the default generator of the device, as dropout does.

    Masked texts are not drawn; an image without any is met by no one.
    """
    keys = torch.rand(matches.images, matches.texts, device=device)
    by_image = matches.hide(keys, -1.0).unflatten(1, (-1, matches.captions))  # [B, W B, N]
    first = by_image.argmax(dim=2, keepdim=True)
    drawn = torch.zeros_like(by_image, dtype=torch.bool).scatter_(2, first, True).flatten(1)
    matches.positives(drawn).fill_(True)
    return matches.hide(drawn, False)


def sampled_sigmoid_loss(scores: Tensor, matches: Matches, scale: Tensor, bias: Tensor) -> Tensor:
    """The sigmoid loss over an image's own N texts and one drawn from each other image (Xiao et al. 2025).

    With N = 1 it is `sigmoid_loss`.

    Args:
        scores: cosines [B, T] in float32.
        matches: which texts are whose.
        scale: a = exp(logit scale), a scalar.
        bias: b, a scalar.

    Returns:
        W times this process's share of -(1/n) sum over the pairs that meet of log sigmoid(y_ij (a s_ij + b)), with
        n = W B + N - 1 texts that an image meets.
    """
    everyone = matches.all_images
    logits = torch.addcmul(bias, scale, scores)
    negatives = F.softplus(logits.masked_fill(~draw_texts(matches, scores.device), -torch.inf)).sum()
    positives = (matches.local_mask(logits) * matches.positives(logits)).sum()
    return (negatives - positives) * (everyone / matches.images) / (everyone + matches.captions - 1)
