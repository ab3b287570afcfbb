"""The outcome of each image of a task: small, and enough for the confidence interval of a difference.

Kept as `per_sample/<task>.npz` beside results.json (plain arrays, read without unpickling): a byte per image, and in
retrieval five bytes per caption.
Shapes: N images, T captions, both in the order of the dataset.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from llip.clipeval.metrics import RECALLS
from llip.system.files import atomic_write

Array = np.ndarray


def _none() -> Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class Outcomes:
    """The rank of each image's right answer.

    Attributes:
        samples: hash of the images' names and targets in their order, see `hash_samples`.
        ranks: of the true class, or of the best of the image's captions, from 0 [N]; at most the depth of the ranking.
        labels: true classes [N]; empty in retrieval.
        text_ranks: rank of each caption's image [T]; owners: position of that image [T]. Empty in classification.
    """

    samples: str
    ranks: Array
    labels: Array = field(default_factory=_none)
    text_ranks: Array = field(default_factory=_none)
    owners: Array = field(default_factory=_none)


@dataclass(frozen=True)
class Parts:
    """A metric as a sum over images: the mean over groups of sum(hits) / sum(counts); each is [N]."""

    hits: Array
    counts: Array
    groups: Array

    def value(self) -> float:
        """Return the metric, a fraction."""
        hits, counts = (np.bincount(self.groups, weights=part) for part in (self.hits, self.counts))
        present = counts > 0
        return float((hits[present] / counts[present]).mean())


def _by_image(hits: Array, groups: Array | None = None) -> Parts:
    groups = np.zeros(len(hits), np.int64) if groups is None else groups.astype(np.int64)
    return Parts(hits.astype(np.float64), np.ones(len(hits)), groups)


def _of_images(outcomes: Outcomes, k: int) -> Parts:
    return _by_image(outcomes.ranks < k)


def _of_captions(outcomes: Outcomes, k: int) -> Parts:
    images = len(outcomes.ranks)
    counts = np.bincount(outcomes.owners, minlength=images).astype(np.float64)
    hits = np.bincount(outcomes.owners, weights=outcomes.text_ranks < k, minlength=images)
    return Parts(hits, counts, np.zeros(images, np.int64))


_PARTS: dict[str, Callable[[Outcomes], Parts]] = {
    "top1": partial(_of_images, k=1),
    "top5": partial(_of_images, k=5),
    "mean_top1_top5": lambda outcomes: _by_image(((outcomes.ranks < 1) + 1.0 * (outcomes.ranks < 5)) / 2),
    "mean_per_class": lambda outcomes: _by_image(outcomes.ranks < 1, outcomes.labels),
    **{f"image_to_text_R@{k}": partial(_of_images, k=k) for k in RECALLS},
    **{f"text_to_image_R@{k}": partial(_of_captions, k=k) for k in RECALLS},
}


def parts_of(outcomes: Outcomes, name: str) -> Parts | None:
    """Return the metric `name` as a sum over images; None for one that is no such sum (ROC AUC)."""
    return _PARTS[name](outcomes) if name in _PARTS else None


def hash_samples(names: Sequence[str], targets: Sequence[object]) -> str:
    """Return 16 hex digits for these images in this order; folders are ignored, they differ between machines."""
    samples = [[name.rsplit("/", 1)[-1], target] for name, target in zip(names, targets, strict=True)]
    return hashlib.sha256(json.dumps(samples, ensure_ascii=False).encode()).hexdigest()[:16]


def outcomes_file(results: Path, task: str) -> Path:
    """Return the file of a task's outcomes: per_sample/<task>.npz beside `results`, a results.json."""
    folder = results.with_name("per_sample" + results.stem.removeprefix("results"))
    return folder / f"{quote(task, safe=' ')}.npz"


def save_outcomes(path: Path, outcomes: Outcomes) -> None:
    """Write the file in one atomic step, and its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            samples=np.array(outcomes.samples),
            ranks=outcomes.ranks.astype(np.uint8),
            labels=outcomes.labels.astype(np.int32),
            text_ranks=outcomes.text_ranks.astype(np.uint8),
            owners=outcomes.owners.astype(np.int32),
        )


def load_outcomes(path: Path) -> Outcomes | None:
    """Read what `save_outcomes` wrote; None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("ranks", "labels", "text_ranks", "owners")}
            return Outcomes(str(stored["samples"]), **arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
