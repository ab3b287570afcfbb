"""Answer a query: a shortlist by text-independent features, then exact scores.

Shapes: N images of the index, n of the shortlist, K mixture tokens, D embedding width.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llip.clipeval.scorer import Scorer
from llip.errors import UserError
from llip.open_clip.pooling import TextConditionedPooling
from llip.tools.search.one_text import applies_to, scores_of_one_text
from llip.tools.search.store import Index

SHORTLIST = 2048
"""Images that are scored exactly by default: the cost of a query hardly grows with the index."""

CLOSE = 1e-4
"""Largest difference between the two exact forms of the scores: rounding."""

BLOCK = 256
"""Images whose mixture tokens are read at once."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """An image. `score`: exact cosine of the query and the image's feature under it."""

    path: Path
    score: float


class Searcher:
    """An open index: features are in memory, mixture tokens stay on disk."""

    def __init__(self, index: Index, scorer: Scorer) -> None:
        """Open an index; `scorer` must be of the model that made it (see `store.check_model`)."""
        self.index, self.scorer = index, scorer
        self.paths = sorted(index.images)
        self.places = [index.images[path][1] for path in self.paths]
        self.segments = {number: index.segment(number) for number in {place.segment for place in self.places}}
        self.features = self._features()  # [N, D]
        self.pooling = self._pooling_for_one_text()

    def _features(self) -> Tensor:
        segments = np.array([place.segment for place in self.places], np.int64)
        rows = np.array([place.row for place in self.places], np.int64)
        features = torch.empty(0)
        for number, (_, values) in self.segments.items():
            members = np.flatnonzero(segments == number)
            if rows[members].max() >= len(values):
                raise UserError(f"index {str(self.index.path)!r} is damaged: segment {number} has too few rows")
            if not len(features):
                features = torch.empty(len(rows), values.shape[1])
            features[members] = torch.from_numpy(values[rows[members]])
        return features.to(self.scorer.device)

    @torch.no_grad()
    def _pooling_for_one_text(self) -> TextConditionedPooling | None:
        """Return the pooling if the faster form of its scores agrees with the model on a few images; else None."""
        pooling = self.scorer.model.pooling
        if not self.places or not applies_to(pooling):
            return None
        h, t = self._tokens(range(min(len(self.places), 4))), self.scorer.encode_texts(["a picture"])
        close = torch.allclose(scores_of_one_text(pooling, h, t[0]), self.scorer.scores(h, t)[:, 0], atol=CLOSE)
        return pooling if close else None

    @torch.no_grad()
    def search(self, text: str, top: int = 20, shortlist: int | None = SHORTLIST) -> list[Hit]:
        """Return the best images for a text, best first; equal scores by path.

        Args:
            top: maximum of images returned.
            shortlist: images that are scored exactly, those with the best text-independent scores; None: all.

        Raises:
            UserError: an empty text, or an index without images.
        """
        if not text.strip():
            raise UserError("the query is empty")
        if not self.paths:
            raise UserError(f"index {str(self.index.path)!r} holds no images")
        t = self.scorer.encode_texts([text])
        chosen = torch.arange(len(self.paths))
        if shortlist is not None and max(shortlist, top) < len(self.paths):
            coarse = self.features @ t[0]
            chosen = coarse.topk(max(shortlist, top)).indices.sort().values.cpu()
        scores = self._scores(chosen.tolist(), t)
        order = scores.sort(descending=True, stable=True).indices[:top].tolist()
        return [Hit(self.index.folder / self.paths[chosen[i]], scores[i].item()) for i in order]

    def _tokens(self, chosen: Sequence[int]) -> Tensor:
        """Return mixture tokens [n, K, D] of images by their number, read from disk."""
        places = [self.places[i] for i in chosen]
        tokens = np.stack([self.segments[place.segment][0][place.row] for place in places])
        return torch.from_numpy(tokens.astype(np.float32, copy=False)).to(self.scorer.device)

    def _scores(self, chosen: list[int], t: Tensor) -> Tensor:
        """Return exact scores [n] of images by their number."""
        parts = []
        for start in range(0, len(chosen), BLOCK):
            h = self._tokens(chosen[start : start + BLOCK])
            if self.pooling is not None:
                parts.append(scores_of_one_text(self.pooling, h, t[0]).cpu())
            else:
                parts.append(self.scorer.scores(h, t)[:, 0].cpu())
        return torch.cat(parts)
