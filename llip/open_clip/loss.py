"""The two objectives, as functions of the scores of this process's images against all texts.

Shapes: B images of this process (and its accumulation slices), T texts of the global batch; image i's own text is
column `offset + i`.

Each returns W times this process's share of the global loss, W being the number of processes: DDP averages gradients
over processes, so the average is the gradient of the global loss, and the mean of the returned values is its value.
Scores, scale and bias are float32, and so is everything here. Both losses keep the scores and nothing else of their
size for the backward pass, where the gradient is known in closed form.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.scores.plan import slices

_NUMBERS_AT_ONCE = 1 << 24  # of [B, T] in temporaries: at the paper's batch one matrix of scores has 4 GiB


def _diagonal(scores: Tensor, offset: int) -> Tensor:
    images, texts = scores.shape
    assert 0 <= offset <= texts - images, f"{images} images at offset {offset} need {images + offset} of {texts} texts"
    return scores.diagonal(offset)


class _SigmoidLoss(torch.autograd.Function):
    """The sum over all pairs, keeping nothing but the scores: dL / d logits = sigmoid(logits) - delta, over B."""

    @staticmethod
    def forward(ctx, scores: Tensor, offset: int, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(scores, scale, bias)
        ctx.offset = offset
        # log sigmoid(x) = log sigmoid(-x) + x: count every pair as negative, then mend the positives.
        blocks = scores.split(_rows_at_once(scores))
        negatives = torch.stack([F.softplus(torch.addcmul(bias, scale, block)).sum() for block in blocks]).sum()
        positives = torch.addcmul(bias, scale, _diagonal(scores, offset)).sum()
        return (negatives - positives) / len(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, scale, bias = ctx.saved_tensors
        gradient = torch.addcmul(bias, scale, scores).sigmoid_()  # [B, T], of the logits
        _diagonal(gradient, ctx.offset).sub_(1)
        gradient.mul_(grad / len(scores))
        of_bias = gradient.sum()
        return (*_of_scores(gradient, scores, scale), of_bias)


class _SoftmaxLoss(torch.autograd.Function):
    """Cross-entropy over rows and columns, with dL / d logits = (row softmax + column softmax - 2 delta) / 2B."""

    @staticmethod
    def forward(ctx, scores: Tensor, offset: int, scale: Tensor, combine: Callable[[Tensor], Tensor] | None) -> Tensor:
        images = len(scores)
        logits = scale * scores
        rows = logits.logsumexp(dim=1, keepdim=True)  # [B, 1]
        columns = logits.logsumexp(dim=0)  # [T], over this process's images
        if combine is not None:
            columns = combine(columns)
        own_columns = columns[offset : offset + images]
        ctx.save_for_backward(scores, scale, rows, columns)
        ctx.offset = offset
        return (rows.sum() + own_columns.sum() - 2 * _diagonal(logits, offset).sum()) / (2 * images)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, scale, rows, columns = ctx.saved_tensors
        gradient = torch.empty_like(scores)  # of the logits
        for block in slices(len(scores), _rows_at_once(scores)):
            logits = scale * scores[block]
            torch.add((logits - rows[block]).exp_(), (logits - columns).exp_(), out=gradient[block])
        _diagonal(gradient, ctx.offset).sub_(2)
        gradient.mul_(grad / (2 * len(scores)))
        return (*_of_scores(gradient, scores, scale), None)


def _of_scores(gradient: Tensor, scores: Tensor, scale: Tensor) -> tuple[Tensor, None, Tensor]:
    """Return the gradients of (scores, offset, scale) from that of the logits, which is overwritten."""
    of_scale = torch.linalg.vecdot(gradient, scores).sum()
    return gradient.mul_(scale), None, of_scale


def _rows_at_once(scores: Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // scores.shape[1])


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
    return _SigmoidLoss.apply(scores, offset, scale, bias)


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
    return _SoftmaxLoss.apply(scores, offset, scale, combine_columns)
