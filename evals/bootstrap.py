"""How sure a difference between two results is: a seeded bootstrap over images.

Drawing N images with replacement matters only through how often each kind of image was drawn, where a kind is all
images with the same outcomes. So the draws are multinomial counts of the kinds: exactly the bootstrap over images, at a
cost that does not grow with N. Shapes: N images, R resamples, S sides, P kinds.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from llip.clipeval.outcomes import Parts

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a difference, in fractions."""

    low: float
    high: float


def difference_draws(first: Parts, second: Parts, *, paired: bool, seed: int, name: str) -> np.ndarray:
    """Return resampled values of second - first [R].

    Args:
        paired: both sides are of the same images in the same order, so that one draw of images serves both.
        seed, name: decide the draws; another task name draws independently.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if paired:
        draws = _draws(np.stack([first.hits, second.hits], axis=1), first.counts, first.groups, rng)
        return draws[:, 1] - draws[:, 0]
    sides = [_draws(side.hits[:, None], side.counts, side.groups, rng)[:, 0] for side in (first, second)]
    return sides[1] - sides[0]


def interval(draws: np.ndarray) -> Interval:
    """Return the percentile interval of resampled values [R]."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _draws(hits: np.ndarray, counts: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the metric [R, S] of resampled images, given hits [N, S], counts [N] and groups [N]."""
    images = len(hits)
    kinds, frequency = np.unique(np.column_stack([groups, counts, hits]), axis=0, return_counts=True)
    drawn = rng.multinomial(images, frequency / images, size=RESAMPLES).astype(np.float64)  # [R, P]
    starts = np.unique(kinds[:, 0], return_index=True)[1]  # kinds are sorted by group
    totals = np.add.reduceat(drawn * kinds[:, 1], starts, axis=1)  # [R, groups]
    present = totals > 0  # a class that was not drawn is left out, as in the metric itself
    values = []
    for side in kinds[:, 2:].T:
        sums = np.add.reduceat(drawn * side, starts, axis=1)
        values.append(np.divide(sums, totals, where=present, out=np.zeros_like(sums)).sum(1) / present.sum(1))
    return np.stack(values, axis=1)
