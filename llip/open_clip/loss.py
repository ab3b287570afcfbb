"""The two objectives, as functions of the scores of this process's images against all texts.

Shapes: B images of this process (and its accumulation slices), T texts of the global batch; image i's own text is
column `offset + i`.

Each returns W times this process's share of the global loss, W being the number of processes: DDP averages gradients
over processes, so the average is the gradient of the global loss, and the mean of the returned values is its value.
Scores, scale and bias are float32, and so is everything here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _diagonal(scores: Tensor, offset: int) -> Tensor:
    images, texts = scores.shape
    assert 0 <= offset <= texts - images, f"{images} images at offset {offset} need {images + offset} of {texts} texts"
    return scores.diagonal(offset)


def sigmoid_loss(scores: Tensor, offset: int, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, equation 1; the one Llip is trained with): every pair is a binary question.

    Args:
        scores: cosines [B, T] in float32.
        offset: the column of image 0's own text.
        scale: a = exp(logit scale), a scalar.
        bias: b, a scalar.

    Returns:
        -(1/B) sum_ij log sigmoid(y_ij (a s_ij + b)), y = +1 for an image's own text and -1 elsewhere.
    """
    logits = scale * scores + bias
    # log sigmoid(x) = log sigmoid(-x) + x: count every pair as negative, then mend the positives.
    negatives = F.softplus(logits).sum()
    return (negatives - _diagonal(logits, offset).sum()) / len(scores)


class _ContrastiveLoss(torch.autograd.Function):
    """Cross-entropy over rows and columns, with dL/d logits = (row softmax + column softmax - 2 delta) / 2B."""

    @staticmethod
    def forward(ctx, logits: Tensor, offset: int, combine: Callable[[Tensor], Tensor] | None) -> Tensor:
        images = len(logits)
        rows = logits.logsumexp(dim=1, keepdim=True)  # [B, 1]
        columns = logits.logsumexp(dim=0)  # [T], over this process's images
        if combine is not None:
            columns = combine(columns)
        own_columns = columns[offset : offset + images]
        ctx.save_for_backward(logits, rows, columns)
        ctx.offset = offset
        return (rows.sum() + own_columns.sum() - 2 * _diagonal(logits, offset).sum()) / (2 * images)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, columns = ctx.saved_tensors
        gradient = (logits - rows).exp_().add_((logits - columns).exp_())  # [B, T]
        _diagonal(gradient, ctx.offset).sub_(2)
        return gradient.mul_(grad / (2 * len(logits))), None, None


def softmax_loss(
    scores: Tensor, offset: int, scale: Tensor, combine_columns: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """CLIP's loss (Radford et al. 2021): the mean of the cross-entropies of images over texts and texts over images.

    Args:
        scores: cosines [B, T] in float32.
        offset: the column of image 0's own text.
        scale: a = exp(logit scale), a scalar.
        combine_columns: turns the log-sum-exp of each column over this process's images [T] into that over the images
            of all processes; not needed when B = T. No gradient passes through it: the gradient with respect to the
            logits is known in closed form.
    """
    return _ContrastiveLoss.apply(scale * scores, offset, combine_columns)
