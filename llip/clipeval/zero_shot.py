"""Zero-shot classification: text features of classes, and images scored against every class.

Shapes: B images, C classes, P prompts per class, D embedding width. An image's feature may depend on the text, so
images meet texts only in `model.similarity`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llip.clipeval.finite import require_finite
from llip.clipeval.loading import Batch, Preprocess
from llip.clipeval.metrics import TOP
from llip.clipeval.texts.labels import Labels
from llip.errors import UserError
from llip.open_clip.model import Llip

PROMPT_ENSEMBLES = ("feature", "score")
TEXT_BATCH = 512
MAX_QUERIES = 2_000_000
"""Text features that `score` keeps at most, all classes together."""


@dataclass(frozen=True)
class Scorer:
    """A model and what goes with it: everything that turns images and texts into scores.

    The model answers `encode_image`, `encode_text`, `similarity` and (for shortlists) `contextualize` as
    `llip.open_clip.model.Llip` does. Towers run under autocast when `autocast_dtype` is given; scores are always
    float32. Values that are not finite raise a `UserError` that names the first bad parameter, else the first bad
    input.
    """

    model: Llip
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def encode_images(self, images: Tensor, name: Callable[[int], str] = "image {} of the batch".format) -> Tensor:
        """Map normalised images [B, 3, H, W] to mixture tokens [B, K, D], float32, on the device; `name` of a row."""
        with self._autocast():
            h = self.model.encode_image(images.to(self.device)).float()
        return require_finite(h, self.model, "image features", name)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Map T texts to unit-norm features [T, D], float32, on the device."""
        parts = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenizer(list(texts[start : start + TEXT_BATCH])).to(self.device)
            with self._autocast():
                parts.append(self.model.encode_text(tokens).float())
        features = require_finite(torch.cat(parts), self.model, "text features", lambda row: f"text {texts[row]!r}")
        return F.normalize(features, dim=-1)

    def scores(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the cosines [B, T], float32, of mixture tokens [B, K, D] and text features [T, D]."""
        return require_finite(self.model.similarity(h, t).float(), self.model, "scores", "image {} of the batch".format)

    def features(self, h: Tensor, t: Tensor) -> Tensor:
        """Return unit-norm features [B, T, D], float32, of mixture tokens [B, K, D] conditioned on texts [T, D]."""
        features = self.model.contextualize(h, t).float()
        return require_finite(features, self.model, "image features", "image {} of the batch".format)


def class_features(
    scorer: Scorer, labels: Labels, classes: Sequence[int], ensemble: str, progress: str | None = None
) -> Tensor:
    """Return the text features [C, Q, D] of some classes: Q = 1 with ensemble `feature`; with `score` the
    prompts, repeated until all classes have the same number.

    `feature` is CLIP's protocol: the mean over prompts of unit-norm features, re-normalised.

    Args:
        progress: title of a progress bar; None shows none.
    """
    queries = labels.queries_per_class * len(labels.classnames)
    if ensemble == "score" and queries > MAX_QUERIES:
        raise UserError(
            f"prompt_ensemble = 'score' repeats the prompts of the synonyms to {queries:,} texts per image, at most "
            f"{MAX_QUERIES:,}; use 'feature'"
        )
    prompts = [labels.prompts_of(label) for label in classes]
    parts = []
    total = sum(map(len, prompts))
    with tqdm(total=total, desc=progress, unit="text", disable=progress is None, leave=False) as bar:
        for block in _text_blocks(prompts):
            texts = [text for some in block for text in some]
            features = scorer.encode_texts(texts).split([len(some) for some in block])  # [P, D] of each class
            if ensemble == "feature":
                parts += [F.normalize(part.mean(dim=0, keepdim=True), dim=-1) for part in features]
            else:  # as many of each class, so that the mean over them is the mean over its prompts
                parts += [part.repeat(labels.queries_per_class // len(part), 1) for part in features]
            bar.update(len(texts))
    return torch.stack(parts)


def _text_blocks(prompts: list[list[str]]) -> Iterator[list[list[str]]]:
    """Yield the prompts of as many classes as one text batch holds, at least one: not all features need stay."""
    block: list[list[str]] = []
    for some in prompts:
        if block and sum(map(len, block)) + len(some) > TEXT_BATCH:
            yield block
            block = []
        block.append(some)
    if block:
        yield block


def class_scores(scorer: Scorer, h: Tensor, features: Tensor) -> Tensor:
    """Return scores [B, C] of mixture tokens h [B, K, D] against class features [C, Q, D], averaged over Q."""
    classes, queries = features.shape[:2]
    return scorer.scores(h, features.flatten(0, 1)).unflatten(1, (classes, queries)).mean(dim=2)


@dataclass(frozen=True)
class BatchPredictions:
    """Predictions of one batch, on the CPU.

    Attributes:
        indices, labels: [B]; for images of several classes the best-scored of them, or -1 without any.
        top: best classes [B, min(5, C)]. margin: score of class 1 minus that of class 0 [B].
        scores: of all classes [B, C], where they were asked for. truth: [B, C], for images of several classes.
    """

    indices: Tensor
    labels: Tensor
    top: Tensor
    margin: Tensor
    scores: Tensor | None = None
    truth: Tensor | None = None


def predict(
    scorer: Scorer,
    batch: Batch,
    features: Tensor,
    name: Callable[[int], str] = "image {} of the batch".format,
    *,
    keep_scores: bool = False,
) -> BatchPredictions:
    """Score one batch of images, called `name(row)` in messages, against every class."""
    scores = class_scores(scorer, scorer.encode_images(batch.images, name), features)  # [B, C]
    # a stable sort: equal scores rank by class number, on every device and for every number of processes
    order = scores.sort(dim=1, descending=True, stable=True).indices
    several = any(isinstance(target, tuple) for target in batch.targets)
    truth = _truth(batch.targets, scores.shape[1]) if several else None
    return BatchPredictions(
        indices=torch.tensor(batch.indices, dtype=torch.int64),
        labels=torch.tensor(batch.targets, dtype=torch.int64) if truth is None else _best_true(truth, order.cpu()),
        top=order[:, :TOP].cpu(),
        margin=(scores[:, 1] - scores[:, 0]).cpu(),
        scores=scores.cpu() if keep_scores else None,
        truth=truth,
    )


def _truth(targets: Sequence[Sequence[int]], classes: int) -> Tensor:
    truth = torch.zeros(len(targets), classes, dtype=torch.bool)
    for row, labels in enumerate(targets):
        truth[row, list(labels)] = True
    return truth


def _best_true(truth: Tensor, order: Tensor) -> Tensor:
    hits = truth.gather(1, order)
    best = order.gather(1, hits.int().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(hits.any(dim=1), best, -1)
