"""What the scores of a step read and write in the GPU's memory, which is what bounds their time, and their FLOPs.

Shapes: B images of a process (n of a block whose Gram matrices are in memory at once), T captions of the global batch
(t of a tile), K mixture tokens, M heads, D embedding width, R = MK.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llip.configs import Config
from llip.open_clip.costs.flops import head_flops, score_plan_of, score_shape
from llip.open_clip.factory import model_spec
from llip.open_clip.kernels.blocks import GROUP, HeadShape
from llip.open_clip.model import autocast_dtype
from llip.open_clip.scores.eager import eager_scores
from llip.open_clip.scores.gram import image_gram, image_gram_backward
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import ScorePlan
from llip.open_clip.scores.similarity import pairwise_scores

_WRITTEN_ONLY = ("out", "grad_input")  # arguments that an operation returns
_READS_NOTHING = ("zeros", "zeros_like", "new_zeros", "zero_", "full", "full_like", "new_full", "fill_")

_FLOAT = 4


@dataclasses.dataclass(frozen=True)
class ScorePart:
    """A part of the scores' step. `kernel`: one of ours, or products of cuBLAS on its arrays."""

    name: str
    bytes: int
    flops: int
    kernel: bool = True

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Return the longer of the times that the memory (bytes/s) and the arithmetic (FLOP/s) take."""
        return max(self.bytes / bandwidth, self.flops / rate)


class ByteCounter(TorchDispatchMode):
    """Sums the bytes of what each operation reads and writes; views and empty tensors move none."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.__name__
        if function.namespace == "aten" and not function.is_view and "view" not in name and "empty" not in name:
            read = (args, [value for key, value in (kwargs or {}).items() if key not in _WRITTEN_ONLY])
            moved = (output,) if name.split(".")[0] in _READS_NOTHING else (read, output)
            self.total += sum(x.nbytes for x in tree_leaves(moved) if isinstance(x, Tensor))
        return output


def score_parts(config: Config) -> list[ScorePart]:
    """Return the parts of one process's scores in a step, forward and backward."""
    spec = model_spec(config)
    plan, shape, head = score_plan_of(config, spec), score_shape(config, spec), head_flops(config, spec)
    images, texts = config.batch_size * config.accum_freq, config.global_texts
    flops = head.forward + head.backward + head.again
    if plan is None or shape is None:
        return [ScorePart("one product", 0, flops, kernel=False)]
    if not plan.by_triton:
        return [ScorePart("eager", _eager_bytes(config, plan, shape), flops, kernel=False)]
    kernels = kernel_parts(images, texts, shape, spec.architecture["embed_dim"], plan)
    rest = flops - sum(part.flops for part in kernels)
    return [
        *kernels,
        ScorePart("Gram matrices, projections", _other_bytes(images, texts, shape, plan), rest, kernel=False),
    ]


def score_bytes(config: Config) -> int:
    """Return the bytes that one process's scores move in a step, forward and backward; 0 without text conditioning."""
    return sum(part.bytes for part in score_parts(config))


def kernel_parts(images: int, texts: int, shape: HeadShape, width: int, plan: ScorePlan) -> list[ScorePart]:
    """Return the Triton kernels and the products that read the backward kernel's arrays (see `kernels.launch`).

    Each tile of the kernels reads its queries and targets, and keys, values and Gram matrix of its image; from memory
    texts come once for each group of images, images once for each tile of the plan, the rest from the L2 cache.
    """
    pairs, rows, item = images * texts, shape.rows, shape.itemsize
    tiles = math.ceil(texts / plan.tile_texts)
    groups = math.ceil(plan.block_images / GROUP) * math.ceil(images / plan.block_images)
    read = groups * texts * 2 * width * item
    read += tiles * images * (rows**2 + 2 * shape.tokens * width) * item
    arrays = pairs * rows * item  # one of the four
    per_pair = 3 * _FLOAT * pairs  # scores, numerators, squared norms; or upstream gradients instead of scores
    products = 2 * pairs * shape.tokens * width  # FLOPs of a product of all pairs with keys, or with values
    norm = 2 * pairs * rows**2
    of_tokens = 2 * images * shape.tokens * width  # numbers of dK and dV
    of_texts = 2 * math.ceil(images / plan.block_images) * texts * width  # numbers of dQ and dT
    sums = 4 * _FLOAT * tiles  # a product is written, then read and added to a total
    return [
        ScorePart("forward kernel", read + per_pair, 2 * products + norm),
        ScorePart("backward kernel", read + per_pair + 4 * arrays, 2 * products + norm),
        ScorePart(
            "products for the tokens, texts",
            4 * arrays + sums * of_tokens + (_FLOAT + item) * of_texts + tiles * of_tokens * item,
            4 * products,
        ),
        ScorePart("products for Gram matrices", 2 * arrays + sums * images * rows**2, norm),
    ]


def _other_bytes(images: int, texts: int, shape: HeadShape, plan: ScorePlan) -> int:
    """Return what Gram matrices and the projections of texts move, both ways."""
    width = shape.heads * shape.key_size

    def grams() -> None:
        values = torch.empty(shape.heads, images, shape.tokens, shape.key_size)
        shared = torch.empty(width, width)
        for dtype in (torch.float16, torch.bfloat16):  # formed, scaled and rounded in each pass
            gram = image_gram(values, shared)
            gram.div_(gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None])
            if shape.itemsize < _FLOAT:
                gram.to(dtype)
        image_gram_backward(values, shared, gram)

    texts_in = _FLOAT + shape.itemsize  # read, rounded
    projected = 2 * (texts_in + 4 * shape.itemsize)  # queries and targets, forward and backward
    returned = 2 * (2 * _FLOAT + 5 * _FLOAT)  # their gradients, transposed; into the weights', and the texts'
    blocks = math.ceil(images / plan.block_images)
    return _count(grams) + blocks * texts * width * (projected + returned)


def _eager_bytes(config: Config, plan: ScorePlan, shape: HeadShape) -> int:
    """Return what eager moves: its code is run on tensors without memory, tile by tile as the run will.

    Where tiles are computed twice, two of them in the direction of the images stand for all.
    """
    width, dtype = shape.heads * shape.key_size, autocast_dtype(config.precision) or torch.float32
    images = all_images = config.batch_size * config.accum_freq
    if not plan.keep:
        images = min(all_images, 2 * plan.tile_images)
    plan = dataclasses.replace(plan, block_images=min(images, plan.block_images))
    by_head = (shape.heads, images, shape.tokens, shape.key_size)

    def scores() -> None:
        keys, values = (torch.empty(by_head, dtype=dtype, requires_grad=True) for _ in range(2))
        texts, *weights = (
            torch.empty(n, width, requires_grad=True) for n in (config.global_texts, width, width, width)
        )
        if plan.form == "features":  # of few pairs
            scores = pairwise_scores(keys, values, texts, weights[0], weights[1], form="features")
        else:
            scores = eager_scores(ScoreInputs(keys, values, texts, *weights), plan, training=True)
        scores.backward(torch.empty_like(scores))

    return _count(scores) * all_images // images


def _count(run: Callable[[], None]) -> int:
    with torch.device("meta"), ByteCounter() as counter:
        run()
    return counter.total
