"""How the scores of all pairs are computed: which exact form, in which tiles, with what memory.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, R = MK.

The forms differ in how the norm of z_ij is computed (see `similarity`). The choice follows from a count of
multiply-adds, without those that all forms share.
"""

import dataclasses
import math
from typing import Literal

Form = Literal["image_gram", "shared_gram", "features"]
KernelName = Literal["eager", "triton"]

DEFAULT_BUDGET_CPU, DEFAULT_BUDGET_ACCELERATOR = 1 << 29, 1 << 31
"""Bytes that the scores of one call may take beyond their inputs and their result."""

_CACHED_ARRAY = 1 << 20  # bytes of one tile's array that still work from a CPU's cache
_FEWEST_TEXTS, _MOST_TEXTS = 16, 4096  # texts of one tile
_KERNEL_TEXTS = 128  # a tile of the kernels has a multiple of these
_ARRAYS = 6  # arrays of one tile's size that are alive at once
_FLOAT = 4  # bytes
_MOST_OF_FEATURES = 1 << 26  # bytes: the features of all pairs are formed at once, which is for few pairs only
# Measured on CPUs, in multiply-adds of a large product:
_VISIT = 16  # one elementwise visit of one number
_SHORT = 128  # texts at which the product with one image's Gram matrix takes twice as long as a large one
_GRAM_CALL = 20_000_000  # the longer way through Python


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Who computes the scores of one shape: PyTorch's operations, or the Triton kernels in `llip.open_clip.kernels`."""

    name: KernelName
    reason: str


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    """What `similarity.pairwise_scores` does for one shape."""

    form: Form
    block_images: int  # images whose Gram matrices are in memory at once
    tile_images: int
    tile_texts: int
    keep: bool  # tiles are kept for the backward pass; otherwise they are computed again there
    peak_bytes: int  # predicted, beyond inputs and result
    budget: int  # bytes
    kernel: Kernel | None = None  # None: eager, on a CPU that was asked for nothing else
    keep_norms: bool = False  # the norm of each pair is kept for the backward pass of the eager tiles

    @property
    def by_triton(self) -> bool:
        """Whether the Triton kernels compute the scores."""
        return self.kernel is not None and self.kernel.name == "triton"

    def __str__(self) -> str:
        words = {"image_gram": "a Gram matrix per image", "shared_gram": "one Gram matrix", "features": "features"}
        kernel = f", score_kernel {self.kernel.name} ({self.kernel.reason})" if self.kernel else ""
        return (
            f"{words[self.form]}, tiles of {self.tile_images} images x {self.tile_texts} texts "
            f"{'kept' if self.keep else 'computed again in the backward pass'}, "
            f"predicted peak {self.peak_bytes / 2**30:.2f} GiB (budget {self.budget / 2**30:.2f} GiB){kernel}"
        )


def cheapest_form(images: int, texts: int, tokens: int, heads: int, width: int, training: bool) -> Form:
    """Return the exact form that takes the fewest multiply-adds, what is done once per call included."""
    pairs, rows = images * texts, tokens * heads
    once = 3 if training else 1  # forward, and two products as large in the backward pass
    # A symmetric matrix gives its product with x in the forward pass, and that product is the gradient too: two
    # products where the features take three. Without gradients half of a symmetric matrix is enough.
    symmetric = 2.0 if training else 0.6
    counts = (8 * rows, 8 * rows + 16 * width, 4 * rows + 8 * width)  # in the order of `costs`
    visits = [_VISIT * count / (1 if training else 2) for count in counts]
    overhead = _GRAM_CALL + texts * width**2 * once  # of forms with a Gram matrix: W_O^T t_j as well
    shared = once * width**3  # W_O^T W_O
    grams = once * images * (tokens * width**2 + rows * tokens * width)
    costs: dict[Form, float] = {
        "image_gram": pairs * (rows**2 * symmetric * (1 + _SHORT / texts) + visits[0]) + shared + grams + overhead,
        "shared_gram": pairs * (width**2 * symmetric + visits[1]) + 2 * shared + overhead,
    }
    if _features_bytes(images, texts, rows, width, training) <= _MOST_OF_FEATURES:
        costs["features"] = pairs * (width**2 * once + visits[2])
    return min(costs, key=costs.__getitem__)


def _features_bytes(images: int, texts: int, rows: int, width: int, training: bool) -> int:
    return _FLOAT * images * texts * (4 if training else 2) * (rows + width)


def plan_scores(
    images: int,
    texts: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    training: bool,
    on_cpu: bool,
    budget: int | None = None,
    form: Form | None = None,
    tile: tuple[int, int] | None = None,
    kernel: Kernel | None = None,
    itemsize: int = _FLOAT,
) -> ScorePlan:
    """Choose form and tiles for one shape.

    Args:
        images, texts, tokens, heads, width: B, T, K, M, D.
        training: gradients will be asked for.
        on_cpu: tiles are small enough for the cache there; elsewhere as large as the budget allows.
        budget: bytes beyond inputs and result; the default of the device when None. Tiles are kept for the backward
            pass if they fit, otherwise they are computed again. Too small a budget gives small tiles, not an error.
        form, tile: force the form, or (images, texts) of a tile.
        kernel: who computes the scores. The Triton kernels have the form with a Gram matrix per image; where so few
            pairs are asked for that no Gram matrix pays, or another form is forced, there is nothing for them to do.
        itemsize: bytes of a number of keys and values, which the kernels' arrays have too.
    """
    if budget is None:
        budget = DEFAULT_BUDGET_CPU if on_cpu else DEFAULT_BUDGET_ACCELERATOR
    forced, form = form, form or cheapest_form(images, texts, tokens, heads, width, training)
    rows = tokens * heads
    if kernel and kernel.name == "triton":
        if form == "image_gram" or (forced is None and form != "features"):
            return _plan_triton(images, texts, rows, width, training, budget, kernel, itemsize)
        kernel = Kernel("eager", f"the kernels have a Gram matrix per image; this shape has {form.replace('_', ' ')}")
    if form == "features":  # all pairs at once, kept by autograd
        peak = _features_bytes(images, texts, rows, width, training)
        return ScorePlan(form, images, images, texts, keep=True, peak_bytes=peak, budget=budget, kernel=kernel)
    widest = rows if form == "image_gram" else max(rows, width)
    block, fixed = images, 2 * _FLOAT * width**2
    if form == "image_gram":  # with its gradient, or its doubled copy
        per_image = _FLOAT * rows * (2 * rows + width // heads)
        block = max(1, min(images, budget // 2 // per_image))
        fixed += block * per_image
    cached = _CACHED_ARRAY if training else 2 * _CACHED_ARRAY  # fewer arrays are alive
    array = min(cached, budget) if on_cpu else max(budget - fixed, budget // 4) // 8
    tile = tile or _tile(block, texts, array // (_FLOAT * widest))
    working = _FLOAT * (tile[0] * tile[1] * _ARRAYS * widest + 4 * tile[1] * width)
    kept = _FLOAT * images * texts * 2 * (rows if form == "image_gram" else width)
    norms = _FLOAT * images * texts * 2
    keep_norms = training and fixed + working + norms <= budget
    keep = keep_norms and block == images and fixed + working + norms + kept <= budget
    peak = fixed + working + (norms if keep_norms else 0) + (kept if keep else 0)
    return ScorePlan(
        form, block, *tile, keep=keep, peak_bytes=peak, budget=budget, kernel=kernel, keep_norms=keep_norms
    )


def _plan_triton(
    images: int, texts: int, rows: int, width: int, training: bool, budget: int, kernel: Kernel, itemsize: int
) -> ScorePlan:
    """Return the plan of the Triton kernels: half of the budget for Gram matrices, the rest for arrays of a tile."""
    per_image = rows**2 * (2 * _FLOAT + itemsize)  # G, dG, and G as the kernels read it
    block = max(1, min(images, budget // 2 // per_image))
    kept = 2 * _FLOAT * images * texts if training else 0  # numerators and squared norms
    fixed = block * per_image + 2 * _FLOAT * width**2
    per_text = 2 * width * (itemsize + _FLOAT)  # queries, targets and their gradients
    if training:
        per_text += block * 4 * rows * itemsize
    most = max(budget - fixed - kept, budget // 4) // per_text // _KERNEL_TEXTS * _KERNEL_TEXTS
    tile_texts = min(texts, max(_KERNEL_TEXTS, most))
    peak = fixed + kept + tile_texts * per_text
    return ScorePlan("image_gram", block, block, tile_texts, False, peak, budget, kernel)


def _tile(images: int, texts: int, pairs: int) -> tuple[int, int]:
    """Return (images, texts) of a tile of at most `pairs` pairs, long in texts: the products are longest there."""
    longest = max(_FEWEST_TEXTS, min(_MOST_TEXTS, pairs))
    tile_texts = math.ceil(texts / math.ceil(texts / longest))  # even tiles
    return max(1, min(images, pairs // tile_texts)), tile_texts


def slices(length: int, step: int) -> list[slice]:
    """Cut `range(length)` into slices of at most `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
