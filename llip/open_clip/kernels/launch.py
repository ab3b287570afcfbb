"""Scores through the Triton kernels, as one autograd function. Importing this imports triton.

Shapes: B images, T texts, n images and t texts of one launch, K mixture tokens, M heads, d, e widths of a head of keys
and values, R = MK.

Forward: Gram matrices of a block of images, then one launch for each tile of texts; c and |z|^2 are kept, two numbers
per pair. Backward: Gram matrices again, then for each tile of texts the kernel and five products:

    dK_m = logit_slopes_m^T Q_m     dQ_m = logit_slopes_m K_m       [nK, t] [t, d]      [t, nK] [nK, d]
    dV_m = value_slopes_m^T T_m     dT_m = value_slopes_m V_m       [nK, t] [t, e]      [t, nK] [nK, e]
    dG_i = norm_slopes_i^T a_i                                      [R, t] [t, R]

dG goes through `image_gram_backward`, dQ and dT through the projections of the texts, as in the eager tiles.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from llip.open_clip.kernels.backward import slopes_kernel
from llip.open_clip.kernels.blocks import GROUP, Blocks, HeadShape, choose_blocks, power_of_two
from llip.open_clip.kernels.forward import scores_kernel
from llip.open_clip.scores.gram import full_precision, image_gram, image_gram_backward
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import ScorePlan, slices
from llip.open_clip.scores.tiles import MIN_SQUARED_NORM

_PROGRAMS = 2  # of the forward kernel per multiprocessor: its registers and shared memory hold no more
_INTERPRETED = triton.knobs.runtime.interpret


@torch.compiler.disable
def kernel_scores(
    inputs: ScoreInputs,
    plan: ScorePlan,
    training: bool,
    *,
    blocks: Blocks | None = None,
    programs: int | None = None,
) -> Tensor:
    """Return the scores [B, T]; with `training` so that gradients can follow.

    Args:
        inputs: on one CUDA device, or anywhere in Triton's interpreter.
        plan: with `image_gram` as its form.
        training: whether gradients are asked for.
        blocks: other block sizes than `choose_blocks`.
        programs: of the forward kernel, if not as many as a GPU runs at once.
    """
    options = _Options(inputs, blocks, programs)
    if training:
        return _KernelScores.apply(plan, options, *inputs)
    return _forward(inputs, plan, options, training=False)[0]


def head_shape(inputs: ScoreInputs) -> HeadShape:
    """Return what the kernels are compiled for."""
    heads, _, tokens, size = inputs.keys.shape
    return HeadShape(heads, tokens, size, inputs.values.shape[3], inputs.keys.element_size())


class _Options:
    """Constants of both kernels for some inputs."""

    def __init__(self, inputs: ScoreInputs, blocks: Blocks | None, programs: int | None) -> None:
        shape, device = head_shape(inputs), inputs.keys.device
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.blocks = blocks = blocks or choose_blocks(shape, hopper)
        self.constants = kernel_constants(shape, blocks, inputs.keys.dtype, matmul_precision(), _INTERPRETED)
        self.launch: dict[str, Any] = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
        if programs is None and device.type == "cuda":
            programs = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
        self.programs = programs or _PROGRAMS

    def tiles(self, images: int, texts: int) -> int:
        """Return how many tiles cover so many images and texts."""
        return images * triton.cdiv(texts, self.blocks.texts)


def matmul_precision() -> str:
    """Return Triton's name for what PyTorch is set to: TF32 products of float32, or exact ones."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def kernel_constants(
    shape: HeadShape, blocks: Blocks, dtype: torch.dtype, precision: str, interpreted: bool = False
) -> dict[str, Any]:
    """Return the constants that both kernels are compiled with."""
    return {
        "M": shape.heads, "K": shape.tokens, "KP": power_of_two(shape.tokens), "D": shape.key_size,
        "E": shape.value_size, "BT": blocks.texts, "PART": blocks.part, "CHUNK": blocks.chunk,
        "VALUE_CHUNK": blocks.value_chunk, "GROUP": GROUP, "FLOOR": MIN_SQUARED_NORM, "PRECISION": precision,
        "EMULATE": interpreted and dtype == torch.bfloat16,
    }  # fmt: skip


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of weights and Gram matrices in the forward pass: float16 has the ten bits of TF32."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _scaled_gram(values: Tensor, shared: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (G_i / g_i [n, R, R], g_i [n]); g_i is the largest entry, so no dtype overflows."""
    gram = image_gram(full_precision(values), shared)
    scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1).clamp_min(MIN_SQUARED_NORM)
    return gram.div_(scale[:, None, None]).to(dtype), scale


def _project(inputs: ScoreInputs, columns: slice) -> tuple[Tensor, Tensor]:
    """Return queries [t, M d] and targets [t, M e] of some texts, texts as rows."""
    texts = inputs.texts[columns].to(inputs.keys.dtype)
    return texts @ inputs.query_weight.to(texts.dtype).T, texts @ inputs.out_weight.to(texts.dtype)


def _forward(inputs: ScoreInputs, plan: ScorePlan, options: _Options, training: bool) -> list[Tensor]:
    """Return the scores, and with `training` their numerators and squared norms: all [B, T]."""
    images, texts, rows = inputs.keys.shape[1], len(inputs.texts), head_shape(inputs).rows
    dtype = norm_dtype(inputs.keys.dtype)
    outputs = [inputs.shared.new_empty(images, texts) for _ in range(3 if training else 1)]
    programs = min(options.programs, options.tiles(min(plan.block_images, images), min(plan.tile_texts, texts)))
    scratch = inputs.keys.new_empty(programs, options.blocks.texts, rows, dtype=dtype)
    for place in slices(images, plan.block_images):
        keys, values = (x.contiguous() for x in inputs.images(place))
        gram, scale = _scaled_gram(values, inputs.shared, dtype)
        for columns in slices(texts, plan.tile_texts):
            queries, targets = _project(inputs, columns)
            tiles = [x[place, columns] for x in outputs]
            grid = (min(programs, options.tiles(*tiles[0].shape)),)
            scores_kernel[grid](
                keys, values, queries, targets, gram, scale, scratch, tiles[0], *(tiles[1:] or 2 * tiles),
                *tiles[0].shape, texts, BC=options.blocks.columns, TRAINING=training,
                **options.constants, **options.launch,
            )  # fmt: skip
    return outputs


class _KernelScores(torch.autograd.Function):
    """Scores [B, T] of `ScoreInputs`."""

    @staticmethod
    def forward(ctx, plan: ScorePlan, options: _Options, *inputs: Tensor) -> Tensor:
        scores, numerators, squares = _forward(ScoreInputs(*inputs), plan, options, training=True)
        ctx.save_for_backward(*inputs, numerators, squares)
        ctx.plan, ctx.options = plan, options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *saved, numerators, squares = ctx.saved_tensors
        inputs, plan = ScoreInputs(*saved), ctx.plan
        gradients = ScoreInputs(*(torch.zeros_like(x, dtype=torch.float32) for x in inputs))
        pairs = (upstream.contiguous(), numerators, squares)
        with torch.autocast(upstream.device.type, enabled=False):
            for place in slices(len(upstream), plan.block_images):
                _backward_block(inputs, place, plan, ctx.options, pairs, gradients)
        return None, None, *(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


def _backward_block(
    inputs: ScoreInputs,
    place: slice,
    plan: ScorePlan,
    options: _Options,
    pairs: tuple[Tensor, Tensor, Tensor],
    gradients: ScoreInputs,
) -> None:
    """Add the gradients of the images at `place` against all texts to `gradients`."""
    keys, values = (x.contiguous() for x in inputs.images(place))
    gram, scale = _scaled_gram(values, inputs.shared, keys.dtype)
    of_gram = torch.zeros_like(gram, dtype=torch.float32)
    of_keys, of_values = (x[:, place].flatten(1, 2) for x in (gradients.keys, gradients.values))  # [M, nK, d], views
    for columns in slices(len(inputs.texts), plan.tile_texts):
        queries, targets = _project(inputs, columns)
        tile = [x[place, columns] for x in pairs]
        weights, norm_slopes, logit_slopes, value_slopes = _slopes(
            options, keys, values, queries, targets, gram, scale, tile, row_length=len(inputs.texts)
        )
        of_gram += _product(norm_slopes.transpose(1, 2), weights)
        for slopes, projected, of_tokens in ((logit_slopes, queries, of_keys), (value_slopes, targets, of_values)):
            by_head = projected.unflatten(1, (len(keys), -1)).transpose(0, 1)  # [M, t, d]
            of_tokens += _product(slopes.transpose(1, 2), by_head)
        of_queries, of_targets = (
            _product(slopes, tokens.flatten(1, 2)).transpose(1, 2).flatten(0, 1)  # [D, t]
            for slopes, tokens in ((logit_slopes, keys), (value_slopes, values))
        )
        inputs.add_projected(columns, of_queries, of_targets, gradients)
    of_gram /= scale[:, None, None]
    of_values_by_gram, of_shared = image_gram_backward(full_precision(values), inputs.shared, of_gram)
    gradients.values[:, place] += of_values_by_gram
    gradients.shared.add_(of_shared)


def _slopes(
    options: _Options,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    targets: Tensor,
    gram: Tensor,
    scale: Tensor,
    pairs: list[Tensor],
    row_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel: weights and norm slopes [n, t, R], logit and value slopes [M, t, nK]."""
    heads, images, tokens, _ = keys.shape
    texts = len(queries)
    weights, norm_slopes = (keys.new_empty(images, texts, heads * tokens) for _ in range(2))
    logit_slopes, value_slopes = (keys.new_empty(heads, texts, images * tokens) for _ in range(2))
    slopes_kernel[(options.tiles(images, texts),)](
        keys, values, queries, targets, gram, scale, *pairs, weights, norm_slopes, logit_slopes, value_slopes,
        images, texts, row_length, **options.constants, **options.launch,
    )  # fmt: skip
    return weights, norm_slopes, logit_slopes, value_slopes


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product in float32, whatever the dtype of its factors."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cpu":  # no other output dtype there
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)
