"""The two objectives, as functions of the scores of this process's images against all texts.

Shapes: B images of this process (and its micro-batches), N captions per image, T texts of the global batch, W
processes; n texts per process, those that a mask leaves out not counted.

Each returns W times this process's share of the global loss: DDP averages gradients over processes, so the average is
the gradient of the global loss, and the mean of the returned values is its value. Scores, scale and bias are float32,
and so is everything here. Both losses keep the scores and nothing else of their size for the backward pass, where the
gradient is known in closed form. The logit of a masked text is -inf: it is in no sum, and has no gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.objectives.matches import Matches
from llip.open_clip.scores.plan import slices

_NUMBERS_AT_ONCE = 1 << 24  # of [B, T] in temporaries: at the paper's batch one matrix of scores has 4 GiB


class _SigmoidLoss(torch.autograd.Function):
    """The sum over all pairs, keeping nothing but the scores: dL / d logits = (sigmoid(logits) - [j is i's]) / n."""

    @staticmethod
    def forward(ctx, scores: Tensor, matches: Matches, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(scores, scale, bias)
        ctx.matches = matches
        # log sigmoid(x) = log sigmoid(-x) + x: count every pair as negative, then mend the positives.
        blocks = scores.split(_rows_at_once(scores))
        logits = (matches.hide(torch.addcmul(bias, scale, block), -torch.inf) for block in blocks)
        negatives = torch.stack([F.softplus(block).sum() for block in logits]).sum()
        positives = torch.addcmul(bias, scale, matches.positives(scores))  # [N, B]
        return (negatives - (matches.local_mask(scores) * positives).sum()) / matches.texts_per_process(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, scale, bias = ctx.saved_tensors
        matches = ctx.matches
        gradient = matches.hide(torch.addcmul(bias, scale, scores), -torch.inf).sigmoid_()  # [B, T], of the logits
        matches.positives(gradient).sub_(matches.local_mask(scores))
        gradient.mul_(grad / matches.texts_per_process(scores))
        of_bias = gradient.sum()
        return (*_of_scores(gradient, scores, scale), of_bias)


class _SoftmaxLoss(torch.autograd.Function):
    """Cross-entropy over rows and columns.

    With weights q [N, B] over an image's own texts (equal, or their softmax inside the logarithm), which sum to one,
    dL / d logits = (row softmax - q) / 2B + (column softmax - [j is i's]) / 2n.
    """

    @staticmethod
    def forward(
        ctx, scores: Tensor, matches: Matches, scale: Tensor, combine: Callable[[Tensor], Tensor] | None, inside: bool
    ) -> Tensor:
        logits = matches.hide(scale * scores, -torch.inf)
        rows = logits.logsumexp(dim=1)  # [B]
        columns = matches.hide(logits.logsumexp(dim=0), 0.0)  # [T], over this process's images
        if combine is not None:
            columns = combine(columns)
        positives, mask = scale * matches.positives(scores), matches.local_mask(scores)  # [N, B]
        q = _text_weights(positives, mask, inside)
        entropy = torch.special.entr(q).sum() if inside else 0.0  # -log sum exp = sum of q (log q - logit)
        ratio = matches.images / matches.texts_per_process(scores)
        weight = q + ratio * mask  # of each positive logit
        # weights of the exponentials, as differences of their exponents
        ctx.save_for_backward(scores, scale, (rows - q.sum(dim=0).log())[:, None], columns - ratio.log(), weight)
        ctx.matches = matches
        of_images = (q.sum(dim=0) * rows).sum()
        of_texts = ratio * (mask * matches.local(columns)).sum()
        return (of_images + of_texts - (weight * positives).sum() - entropy) / (2 * matches.images)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, scale, rows, columns, weight = ctx.saved_tensors
        gradient = torch.empty_like(scores)  # of the logits, times 2B
        for block in slices(len(scores), _rows_at_once(scores)):
            logits = ctx.matches.hide(scale * scores[block], -torch.inf)
            torch.add((logits - rows[block]).exp_(), (logits - columns).exp_(), out=gradient[block])
        ctx.matches.positives(gradient).sub_(weight)
        gradient.mul_(grad / (2 * len(scores)))
        return (*_of_scores(gradient, scores, scale), None, None)


def _text_weights(positives: Tensor, mask: Tensor, inside: bool) -> Tensor:
    """Return the weights of an image's own texts [N, B], which sum to one (to zero where none counts).

    Args:
        positives: logits [N, B].
        mask: 1, or 0 for a masked text [N, B].
        inside: the positives are summed inside the logarithm.
    """
    if inside:
        return mask * positives.masked_fill(mask == 0, torch.finfo(positives.dtype).min).softmax(dim=0)
    return mask / mask.sum(dim=0).clamp_min(1)


def _of_scores(gradient: Tensor, scores: Tensor, scale: Tensor) -> tuple[Tensor, None, Tensor]:
    """Return the gradients of (scores, matches, scale) from that of the logits, which is overwritten."""
    of_scale = torch.linalg.vecdot(gradient, scores).sum()
    return gradient.mul_(scale), None, of_scale


def _rows_at_once(scores: Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // scores.shape[1])


def sigmoid_loss(scores: Tensor, matches: Matches, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, equation 1; the one Llip is trained with): every pair is a binary question.

    Divided by the texts, as FLAIR does (Xiao et al. 2025): with one text per image these are the images.

    Args:
        scores: cosines [B, T] in float32.
        matches: which texts are whose.
        scale: a = exp(logit scale), a scalar.
        bias: b, a scalar.

    Returns:
        -(1/n) sum_ij log sigmoid(y_ij (a s_ij + b)), y = +1 for an image's own texts and -1 elsewhere.
    """
    return _SigmoidLoss.apply(scores, matches, scale, bias)


def softmax_loss(
    scores: Tensor,
    matches: Matches,
    scale: Tensor,
    combine_columns: Callable[[Tensor], Tensor] | None = None,
    *,
    inside: bool = False,
) -> Tensor:
    """CLIP's loss (Radford et al. 2021): the mean of the cross-entropies of images over texts and texts over images.

    Of several texts of an image each has its cross-entropy over images, averaged over texts. The image's own is
    -(1/N) sum_j log p_ij over its texts (SupCon's "out", Khosla et al. 2020), or -log sum_j p_ij (its "in" without the
    division by N), averaged over images.

    Args:
        scores: cosines [B, T] in float32.
        matches: which texts are whose.
        scale: a = exp(logit scale), a scalar.
        combine_columns: turns the log-sum-exp of each column over this process's images [T] into that over the images
            of all processes; not needed where there is one process. No gradient passes through it: the gradient with
            respect to the logits is known in closed form.
        inside: sum the image's own texts inside the logarithm.
    """
    return _SoftmaxLoss.apply(scores, matches, scale, combine_columns, inside)
