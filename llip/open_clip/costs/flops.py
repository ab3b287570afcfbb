"""FLOPs of a step by part, from shapes alone. A multiply-add counts as two; products and convolutions count, no more.

Shapes: B images of a process, T texts of the global batch, N tokens of a tower, W its width, K mixture tokens, M heads
of the pooling, D embedding width, d = D / M, R = MK.

Attention counts in full, although the text tower's mask leaves half of it unused (so does PyTorch's own flop counter).
"""

import dataclasses
from typing import Any

import torch

from llip.configs import Config
from llip.extensions import find_extension
from llip.open_clip.costs.shapes import (
    Tower,
    backbone_tower,
    fewest_tokens,
    hf_text_tower,
    kept_patches,
    timm_image_tower,
)
from llip.open_clip.factory import ModelSpec, model_spec
from llip.open_clip.kernels.blocks import HeadShape
from llip.open_clip.kernels.select import choose_kernel, planned_kernel
from llip.open_clip.model import autocast_dtype
from llip.open_clip.scores.gram import upper_blocks
from llip.open_clip.scores.plan import ScorePlan, plan_scores
from llip.open_clip.towers.locks import LockImage, LockText


def image_tower(spec: ModelSpec, mixture_tokens: int | None = None, lock: LockImage = False) -> Tower:
    """Return the image tower in training; with another number of mixture tokens where one is given.

    Towers from timm come in many shapes: they are run without memory, under PyTorch's own flop counter.

    Args:
        spec: the model.
        mixture_tokens: K, if not the model's.
        lock: `lock_image` of the run.
    """
    vision: dict[str, Any] = spec.architecture["vision_cfg"]
    tokens = spec.mixture_tokens if mixture_tokens is None else mixture_tokens
    if "mixture_head" in spec.architecture:
        return backbone_tower(dataclasses.replace(spec, mixture_tokens=tokens), lock)
    if vision.get("timm_model_name"):
        return timm_image_tower(dataclasses.replace(spec, mixture_tokens=tokens)).locked(lock, tokens > 1)
    width, patch = vision.get("width", 768), vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    kept = kept_patches(patches, vision.get("patch_dropout", 0.0))
    return Tower(
        tokens=tokens + kept,
        width=width,
        layers=vision.get("layers", 12),
        heads=width // vision.get("head_width", 64),
        hidden=int(width * vision.get("mlp_ratio", 4.0)),
        stem=2 * patches * 3 * patch**2 * width,
        projected=tokens if spec.pair_tokens == "mixture" else tokens + kept,
        embedding=spec.architecture["embed_dim"],
    ).locked(lock, tokens > 1)


def pair_tokens(spec: ModelSpec) -> int:
    """Return how many tokens of an image a text attends to in training."""
    if spec.pair_tokens == "mixture":
        return spec.mixture_tokens
    both = image_tower(spec).projected
    return both - spec.mixture_tokens if spec.pair_tokens == "patches" else both


def keys_per_image(spec: ModelSpec) -> int | None:
    """Return how many keys of an image a text attends to in training; None where it attends to none."""
    extra = getattr(find_extension("pooling", spec.pooling), "extra_keys", None)
    return None if extra is None else pair_tokens(spec) + extra


def text_tower(spec: ModelSpec, lock: LockText = False) -> Tower:
    """Return the text tower; `lock` is the run's `lock_text`."""
    text: dict[str, Any] = spec.architecture["text_cfg"]
    if "hf_config" in text:
        return hf_text_tower(spec).locked(lock)
    width = text.get("width", 512)
    return Tower(
        tokens=spec.context_length,
        width=width,
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        hidden=int(width * text.get("mlp_ratio", 4.0)),
        stem=0,
        projected=1,
        embedding=spec.architecture["embed_dim"],
    ).locked(lock)


@dataclasses.dataclass(frozen=True)
class Head:
    """FLOPs of the scores of one process's images against all texts.

    Attributes:
        forward, backward: with tiles kept from the one to the other.
        again: what is executed beyond that where tiles are not kept, or less what the plain forward pass saves.
    """

    forward: int
    backward: int
    again: int


def _upper(rows: int) -> int:
    """Multiply-adds of a product with the upper block triangle of a symmetric [rows, rows]."""
    return sum((min(block.stop, rows) - block.start) * (rest.stop - rest.start) for block, rest in upper_blocks(rows))


def text_head(images: int, texts: int, tokens: int, heads: int, width: int, plan: ScorePlan) -> Head:
    """Return the FLOPs of text-conditioned scores, as `similarity.pairwise_scores` and its caller do them."""
    rows, size = heads * tokens, width // heads
    pairs, projected = images * texts, 2 * 2 * texts * width**2  # queries and targets
    keys_values = 2 * 2 * images * tokens * width**2
    product = 2 * pairs * tokens * width  # of attention weights, or logits, with what a token has for a head
    if plan.form == "features":
        forward = keys_values + projected // 2 + 2 * product + 2 * pairs * width**2
        return Head(forward, 2 * forward, 0)
    shared = 2 * width**3
    triangle = heads * (heads + 1)  # twice the pairs of heads m <= m'
    left, grams = images * tokens * size**2 * triangle, images * tokens**2 * size * triangle
    if plan.form == "image_gram":
        once, norm, half_norm = left + grams, 2 * pairs * rows**2, 2 * pairs * _upper(rows)
        gram_backward = half_norm + 3 * left + 2 * grams
    else:
        once, norm, half_norm = 0, 2 * pairs * width**2, 2 * pairs * _upper(width)
        gram_backward = half_norm
    tiles = 2 * product + norm
    forward = keys_values + shared + once + projected + tiles
    backward = 2 * keys_values + 2 * shared + 3 * projected + 4 * product + gram_backward
    blocks = -(-images // plan.block_images)
    if plan.by_triton:  # all of the symmetric products, and the forward kernel's once more in the backward kernel
        again = norm - half_norm + once + tiles + (blocks - 1) * 4 * projected
        return Head(forward, backward, again + blocks * projected)
    plain = half_norm - norm + (blocks - 1) * projected  # the forward pass that keeps nothing
    weights = 0 if plan.form == "image_gram" else product
    again = weights if plan.keep else plain + once + tiles + (blocks - 1) * 3 * projected
    return Head(forward, backward, again)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step by part, per image of the batch with its N texts, forward and backward.

    Attributes:
        image_tower: of the tower with one token, or those that a timm tower brings. extra_tokens: what
            the others add to it. text_tower: of N texts.
        head: scores of the image against all texts of the global batch.
        recomputed: executed beyond these, by gradient checkpointing, accumulation and score tiles that are not kept.
    """

    image_tower: float
    extra_tokens: float
    text_tower: float
    head: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the MFU is counted in: everything but recomputation."""
        return self.image_tower + self.extra_tokens + self.text_tower + self.head

    @property
    def executed(self) -> float:
        """What the GPU really does."""
        return self.model + self.recomputed


def score_shape(config: Config, spec: ModelSpec | None = None) -> HeadShape | None:
    """Return the shape of a run's text-conditioned head; None without text conditioning."""
    spec = spec or model_spec(config)
    keys, size = keys_per_image(spec), spec.architecture["embed_dim"] // spec.pool_heads
    if keys is None:
        return None
    return HeadShape(spec.pool_heads, keys, size, size, (autocast_dtype(config.precision) or torch.float32).itemsize)


def score_plan_of(
    config: Config, spec: ModelSpec | None = None, on_cpu: bool = False, device: torch.device | None = None
) -> ScorePlan | None:
    """Return how a process of the run computes its scores; None without text conditioning.

    Args:
        config, spec: the run, and its model if that is known.
        on_cpu: the run is on a CPU.
        device: of the run, on which the kernels can be tried; None: a CUDA device is planned for.

    Raises:
        UserError: `score_kernel=triton` where the kernels cannot run.
    """
    spec = spec or model_spec(config)
    shape = score_shape(config, spec)
    if shape is None:
        return None
    budget = None if config.score_memory is None else int(config.score_memory * 2**30)
    if device is not None:
        kernel = choose_kernel(device, autocast_dtype(config.precision) or torch.float32, shape)
    else:
        kernel = None if on_cpu else planned_kernel(config.score_kernel, shape)
    return plan_scores(
        config.batch_size * config.accum_freq, config.global_texts, shape.tokens, shape.heads,
        spec.architecture["embed_dim"], training=True, on_cpu=on_cpu, budget=budget, kernel=kernel,
        itemsize=shape.itemsize,
    )  # fmt: skip


def head_flops(config: Config, spec: ModelSpec, on_cpu: bool = False) -> Head:
    """Return the FLOPs of one process's scores in one step."""
    images, texts, width = config.batch_size * config.accum_freq, config.global_texts, spec.architecture["embed_dim"]
    plan, keys, product = score_plan_of(config, spec, on_cpu), keys_per_image(spec), 2 * images * texts * width
    if plan is None or keys is None:
        return Head(product, 2 * product, 0)
    head = text_head(images, texts, keys, spec.pool_heads, width, plan)
    if config.global_loss_weight and spec.pooling == "flair":  # the first token
        head = Head(head.forward + product, head.backward + 2 * product, head.again)
    elif config.global_loss_weight:  # features conditioned on the zero text, to which no gradient goes
        tokens = images * keys * width
        forward = 4 * tokens * width + 4 * tokens + 2 * (images + 1) * width**2 + product
        head = Head(head.forward + forward, head.backward + 2 * forward - 2 * width**2, head.again)
    return head


def step_flops(config: Config, on_cpu: bool = False) -> StepFlops:
    """Return the FLOPs of one training step by part, per image."""
    spec = model_spec(config)
    lock, head = config.lock_image, head_flops(config, spec, on_cpu)
    image, text = image_tower(spec, lock=lock), text_tower(spec, config.lock_text)
    plain = image_tower(spec, fewest_tokens(spec), lock)
    images, captions = config.batch_size * config.accum_freq, config.captions_per_image
    recomputed = head.again / images
    if config.grad_checkpointing:
        recomputed += image.layers * image.block + captions * text.layers * text.block
    if config.accum_freq > 1:  # features first, without a graph
        recomputed += image.forward + captions * text.forward
    return StepFlops(
        image_tower=plain.forward + plain.backward,
        extra_tokens=image.forward + image.backward - plain.forward - plain.backward,
        text_tower=captions * (text.forward + text.backward),
        head=(head.forward + head.backward) / images,
        recomputed=recomputed,
    )


def flops_per_image(config: Config) -> int:
    """Return the model FLOPs of one image with its texts in a training step, without recomputation.

    Times images per second, over the peak of the GPUs (`gpus.peak_flops`), this is the MFU.
    """
    return round(step_flops(config).model)
