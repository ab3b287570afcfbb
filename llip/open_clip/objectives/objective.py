"""What a config's `loss` may name: a function of the scores, and where the logit scale and bias start with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from llip.open_clip.objectives.losses import sigmoid_loss, softmax_loss
from llip.open_clip.objectives.matches import Matches
from llip.open_clip.objectives.sampled import sampled_sigmoid_loss

CombineColumns = Callable[[Tensor], Tensor]
"""Turns the log-sum-exp of each column over this process's images [T] into that over all processes' images."""


class LossFunction(Protocol):
    """Scores of this process's images against all texts -> W times this process's share of the global loss."""

    def __call__(
        self, scores: Tensor, matches: Matches, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None
    ) -> Tensor:
        """Return a scalar.

        Args:
            scores: cosines [B, T] in float32.
            matches: which texts belong to which images.
            scale: a = exp(logit scale), a scalar.
            bias: b, a scalar; None where the objective has none.
            combine: None where there is one process.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and where its scale and bias start.

    Attributes:
        loss: the function. It averages over the images or texts of one process, so that DDP's average of the gradients
            is the gradient of the global loss.
        scale: a at the start.
        bias: b at the start; None: the objective has none (a parameter without gradient would stall DDP).
        global_loss: the function of text-free scores (`global_loss_weight`); None: `loss`.
    """

    loss: LossFunction
    scale: float
    bias: float | None
    global_loss: LossFunction | None = None


def _sigmoid(
    scores: Tensor,
    matches: Matches,
    scale: Tensor,
    bias: Tensor | None,
    combine: CombineColumns | None,
    loss: Callable[[Tensor, Matches, Tensor, Tensor], Tensor] = sigmoid_loss,
) -> Tensor:
    assert bias is not None, "the sigmoid loss has a bias"
    return loss(scores, matches, scale, bias)


def _softmax(
    scores: Tensor,
    matches: Matches,
    scale: Tensor,
    bias: Tensor | None,
    combine: CombineColumns | None,
    inside: bool = False,
) -> Tensor:
    return softmax_loss(scores, matches, scale, combine, inside=inside)


SIGMOID = Objective(_sigmoid, scale=10.0, bias=-10.0)
"""SigLIP's, the one that Llip is trained with."""
FLAIR_SAMPLED = Objective(
    functools.partial(_sigmoid, loss=sampled_sigmoid_loss), scale=10.0, bias=-10.0, global_loss=_sigmoid
)
"""FLAIR's, with the texts that its code draws; `SIGMOID` is exact over all of them."""
SOFTMAX = Objective(_softmax, scale=1 / 0.07, bias=None)
"""CLIP's."""
SOFTMAX_IN = Objective(functools.partial(_softmax, inside=True), scale=1 / 0.07, bias=None)
"""CLIP's, with the texts of an image summed inside the logarithm."""
