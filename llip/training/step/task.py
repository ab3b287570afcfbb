"""The module that DDP wraps: model and objective in one forward, so that DDP sees every parameter.

Shapes: B images of this process, N captions per image, T texts of the global batch, K mixture tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llip.configs import Config
from llip.extensions import find_extension
from llip.open_clip.kernels.select import request_score_kernel
from llip.open_clip.model import Llip
from llip.open_clip.objectives.matches import Matches
from llip.open_clip.objectives.objective import LossFunction, Objective
from llip.system.processes import Processes
from llip.training.distributed.collectives import combine_logsumexp, gather_texts

_MEASURED = 32  # images


class Features(NamedTuple):
    """What the two towers give for B images with N captions each, or the gradient of the loss with respect to it."""

    h: Tensor  # [B, K, D]
    t: Tensor  # [B N, D]


class ContrastiveTask(nn.Module):
    """Images and texts of this process in, this process's share of the global loss out.

    The share is scaled so that DDP's *average* of the gradients is the gradient of the global loss (METHOD, Objective).
    """

    def __init__(self, model: Llip, config: Config, processes: Processes) -> None:
        """Join model and objective.

        Args:
            model: built for the config's loss.
            config: the run.
            processes: this process's place.
        """
        super().__init__()
        self.objective: Objective = find_extension("loss", config.loss)
        has_bias = model.logit_bias is not None
        assert has_bias == (self.objective.bias is not None), f"the model was not built for the {config.loss} loss"
        self.model, self.config, self.processes = model, config, processes
        request_score_kernel(config.score_kernel)
        self.memory_budget = None if config.score_memory is None else int(config.score_memory * 2**30)
        self.seen: Features | None = None  # of the first images, with one caption each, to be measured now and then

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        features: Features | None = None,
        feature_gradients: Features | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (what to back-propagate, report).

        At once: `task(images, tokens, mask)`. With accumulation in two steps (`accumulation.py`): the loss of cached
        features, `task(mask=..., features=...)`, and `task(images, tokens, mask, feature_gradients=...)`, which
        propagates their gradients into the towers.

        Args:
            images: uint8 [B, 3, S, S] on the device, or cached features [B, L, W].
            tokens: token ids [B, N, C], or cached features [B, N, W].
            mask: [B, N], False where a caption comes again.
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
        return self._loss(features, mask)

    def encode(self, images: Tensor, tokens: Tensor) -> Features:
        """Run both towers, or of a tower what follows its cached features, which are floats."""
        model, texts = self.model, tokens.flatten(0, 1)
        if images.is_floating_point():
            h = model.encode_image_features(images)
        else:
            h = model.encode_image(model.normalise(images))
        t = model.encode_text_features(texts) if texts.is_floating_point() else model.encode_text(texts)
        return Features(h, t)

    def _loss(self, features: Features, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        h, weight = features.h, self.config.global_loss_weight
        first_captions = features.t.unflatten(0, (len(h), -1))[:, 0]
        self.seen = Features(*(part[:_MEASURED].detach().clone() for part in (h, first_captions)))
        texts = gather_texts(features.t, self.processes)  # [T, D]
        matches = self._matches(len(h), len(texts), mask)
        objective = self.objective
        loss = self._loss_of(objective.loss, self.model.similarity(h, texts, self.memory_budget), matches)
        if weight:
            global_loss = objective.global_loss or objective.loss
            of_images = self._loss_of(global_loss, self.model.pooling.global_scores(h, texts), matches)
            loss = (1 - weight) * loss + weight * of_images
        report = {"logit_scale": self.model.logit_scale.detach().exp()}
        if self.model.logit_bias is not None:
            report["logit_bias"] = self.model.logit_bias.detach()
        return loss, report

    def _matches(self, images: int, texts: int, mask: Tensor | None) -> Matches:
        captions = self.config.captions_per_image
        if self.config.caption_fill == "mask" and captions > 1:
            assert mask is not None
            mask = gather_texts(mask.flatten(), self.processes)  # [T]
        else:
            mask = None  # every text counts
        return Matches(images, texts, captions, self.processes.rank * images, mask)

    def _loss_of(self, loss: LossFunction, scores: Tensor, matches: Matches) -> Tensor:
        """Return this process's share of the loss of scores [B, T]."""
        combine = combine_logsumexp if self.processes.world_size > 1 else None
        with torch.autocast(scores.device.type, enabled=False):
            return loss(scores, matches, self.model.logit_scale.exp(), self.model.logit_bias, combine)
