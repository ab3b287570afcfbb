"""Which image-caption pairs get an exact score: a text-independent score selects n candidates each way.

Shapes: B images of a block, N images of all processes (I with those that cannot be read), T captions, D embedding
width, n the length of the shortlist.

The text-independent feature of an image is its feature conditioned on the zero vector: every mixture token weighs the
same. It costs D multiply-adds per pair, where an exact score takes hundreds of times as many. Of four candidates
(conditioned on zero, conditioned on the average caption, mean of unit-norm values, mean of the tokens) this one and the
mean of unit-norm values kept the most recall, equally much. For a pooling that ignores the text it is the feature
itself, and a shortlist loses nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llip.clipeval.scorer import Scorer

CAPTIONS = 1024
"""Captions that are processed at once, which bounds memory."""


@dataclass(frozen=True)
class Shortlist:
    """The candidates: a pair is scored exactly when its caption is among the image's n best or the other way round.

    Attributes:
        features: text-independent features [I, D] by index in the dataset. texts: [T, D].
        best_images: indices of each caption's n best images [T, n].
    """

    features: Tensor
    texts: Tensor
    best_images: Tensor
    length: int

    @classmethod
    def of(cls, features: Tensor, images: Tensor, texts: Tensor, length: int) -> "Shortlist":
        """Find every caption's candidates among the images of indices `images` [N]."""
        count = min(length, len(images))
        readable = features[images]
        best = [images[(block @ readable.T).topk(count, dim=1).indices] for block in texts.split(CAPTIONS)]
        return cls(features, texts, torch.cat(best), length)

    def candidates(self, images: Tensor) -> Tensor:
        """Return which captions are scored exactly against the images of indices `images` [B]: a mask [B, T]."""
        coarse = self.features[images] @ self.texts.T
        best = coarse.topk(min(self.length, coarse.shape[1]), dim=1).indices
        chosen = torch.zeros(coarse.shape, dtype=torch.bool, device=coarse.device).scatter_(1, best, True)
        row_of = torch.full((len(self.features),), -1, device=coarse.device)
        row_of[images] = torch.arange(len(images), device=coarse.device)
        rows = row_of[self.best_images]  # [T, n], -1 for images of other blocks
        captions, columns = (rows >= 0).nonzero(as_tuple=True)
        chosen[rows[captions, columns], captions] = True
        return chosen


def candidate_scores(scorer: Scorer, h: Tensor, texts: Tensor, chosen: Tensor) -> Tensor:
    """Return exact scores [B, T] where `chosen` [B, T] and -inf elsewhere."""
    if chosen.float().mean() > 0.25:  # one large product is faster than many small ones
        return scorer.scores(h, texts).masked_fill(~chosen, -torch.inf)
    scores = torch.full(chosen.shape, -torch.inf, device=h.device)
    for image, row in enumerate(chosen):
        captions = row.nonzero()[:, 0]
        scores[image, captions] = scorer.scores(h[image : image + 1], texts[captions])[0]
    return scores
