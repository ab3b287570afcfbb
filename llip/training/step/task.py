"""The module that DDP wraps: model and objective in one forward, so that DDP sees every parameter.

Shapes: B pairs of this process, K mixture tokens, D embedding width, T texts of the global batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llip.extensions import find_extension
from llip.open_clip.matches import Matches
from llip.open_clip.model import Llip
from llip.open_clip.objectives import Objective
from llip.open_clip.scores.plan import ScorePlan
from llip.system.processes import Processes
from llip.training.distributed.collectives import combine_logsumexp, gather_texts

_MEASURED = 32  # pairs


class Features(NamedTuple):
    """What the two towers give for B pairs, or the gradient of the loss with respect to it."""

    h: Tensor  # [B, K, D]
    t: Tensor  # [B, D]


class ContrastiveTask(nn.Module):
    """Images and texts of this process in, this process's share of the global loss out.

    The share is scaled so that DDP's *average* of the gradients is the gradient of the global loss (METHOD, Objective).
    """

    def __init__(self, model: Llip, loss: str, processes: Processes, score_memory: float | None = None) -> None:
        """Join model and objective.

        Args:
            model: with a logit bias if and only if the loss is the sigmoid one.
            loss: name of the objective.
            processes: this process's place.
            score_memory: GiB that the scores of all pairs may take; None: the default of the device.
        """
        super().__init__()
        self.objective: Objective = find_extension("loss", loss)
        has_bias = model.logit_bias is not None
        assert has_bias == (self.objective.bias is not None), f"the model was not built for the {loss} loss"
        self.model, self.processes = model, processes
        self.memory_budget = None if score_memory is None else int(score_memory * 2**30)
        self.seen: Features | None = None  # the first of the last batch's features, to be measured now and then

    def score_plan(self, images: int) -> ScorePlan | None:
        """Return how the scores of `images` images of this process are computed; None without text conditioning."""
        return self.model.pooling.score_plan(
            images, images * self.processes.world_size, self.model.config["mixture_tokens"],
            on_cpu=self.processes.device.type == "cpu", memory_budget=self.memory_budget,
        )  # fmt: skip

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        features: Features | None = None,
        feature_gradients: Features | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (what to back-propagate, report).

        In one go: `task(images, tokens)`. With accumulation in two (`accumulation.py`): `task(features=...)` is the
        loss of cached features, and `task(images, tokens, feature_gradients=...)` carries their gradients on into the
        towers.

        Args:
            images: uint8 [B, 3, S, S] on the device.
            tokens: token ids [B, C].
            features: cached features of the whole process's batch.
            feature_gradients: of the loss, with respect to the features of these images and tokens.
        """
        if features is None:
            assert images is not None
            assert tokens is not None
            features = self.encode(images, tokens)
        if feature_gradients is not None:
            surrogate = (features.h * feature_gradients.h).sum() + (features.t * feature_gradients.t).sum()
            # The head had its gradient from the cached features; DDP still waits to see its parameters used.
            unused = sum(
                p.sum() for name, p in self.model.named_parameters() if not name.startswith(("visual.", "text."))
            )
            return surrogate + 0.0 * unused, {}
        return self._loss(features)

    def encode(self, images: Tensor, tokens: Tensor) -> Features:
        """Run both towers."""
        return Features(self.model.encode_image(self.model.normalise(images)), self.model.encode_text(tokens))

    def _loss(self, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen = Features(*(part[:_MEASURED].detach().clone() for part in features))
        texts = gather_texts(features.t, self.processes)  # [T, D]
        scores = self.model.similarity(features.h, texts, self.memory_budget)  # [B, T]
        images = len(features.h)
        matches = Matches(images, len(texts), offset=self.processes.rank * images)
        scale = self.model.logit_scale.exp()
        report = {"logit_scale": scale.detach()}
        with torch.autocast(scores.device.type, enabled=False):
            combine = combine_logsumexp if self.processes.world_size > 1 else None
            loss = self.objective.loss(scores, matches, scale, self.model.logit_bias, combine)
        if self.model.logit_bias is not None:
            report["logit_bias"] = self.model.logit_bias.detach()
        return loss, report
