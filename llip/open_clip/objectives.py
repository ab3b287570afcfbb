"""What a config's `loss` may name: a function of the scores, and where the logit scale and bias start with it."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from llip.open_clip.loss import sigmoid_loss, softmax_loss

CombineColumns = Callable[[Tensor], Tensor]
"""Turns the log-sum-exp of each column over this process's images [T] into that over all processes' images."""


class LossFunction(Protocol):
    """Scores of this process's images against all texts -> W times this process's share of the global loss."""

    def __call__(
        self, scores: Tensor, offset: int, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None
    ) -> Tensor:
        """Return a scalar.

        Args:
            scores: cosines [B, T] in float32.
            offset: the column of image 0's own text.
            scale: a = exp(logit scale), a scalar.
            bias: b, a scalar; None where the objective has none.
            combine: None where there is one process.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and where its scale and bias start.

    Attributes:
        loss: the function. It averages over the B images of the process, so that DDP's average of the gradients is the
            gradient of the global loss.
        scale: a at the start.
        bias: b at the start; None: the objective has none (a parameter without gradient would stall DDP).
    """

    loss: LossFunction
    scale: float
    bias: float | None


def _sigmoid(scores: Tensor, offset: int, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None) -> Tensor:
    assert bias is not None, "the sigmoid loss has a bias"
    return sigmoid_loss(scores, offset, scale, bias)


def _softmax(scores: Tensor, offset: int, scale: Tensor, bias: Tensor | None, combine: CombineColumns | None) -> Tensor:
    return softmax_loss(scores, offset, scale, combine)


SIGMOID = Objective(_sigmoid, scale=10.0, bias=-10.0)
"""SigLIP's, the one that Llip is trained with."""
SOFTMAX = Objective(_softmax, scale=1 / 0.07, bias=None)
"""CLIP's."""
