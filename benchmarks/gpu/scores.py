"""Sections 1 to 3: correctness of the scores, cost of the eager tiles, and the Triton kernels against them."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import HEADS, Setting, Shape, attempt, milliseconds, relative, score_inputs
from llip.open_clip.kernels.select import request_score_kernel
from llip.open_clip.scores.plan import Form
from llip.open_clip.scores.similarity import pairwise_scores

GAIN = 4.5
_FORMS: tuple[Form, ...] = ("image_gram", "shared_gram", "features")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _step(leaves: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    """Return the scores and the gradients of all inputs."""
    for leaf in leaves:
        leaf.grad = None
    scores = pairwise_scores(*leaves, GAIN, **options)
    scores.backward(upstream.to(scores.dtype))
    return [scores.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _errors(shape: Shape, setting: Setting, dtype: torch.dtype, **options: Any) -> dict[str, float]:
    leaves, upstream = score_inputs(shape, setting.device, dtype)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = _step(exact_leaves, upstream.double(), form="features")
    names = ("scores", "keys", "values", "texts", "W_Q", "W_O")
    measured = _step(leaves, upstream, **options)
    return {name: relative(a, b) for name, a, b in zip(names, measured, exact, strict=True)}


def correctness(setting: Setting) -> list[dict]:
    """Return relative errors against float64, by form, precision, budget and size; eager and kernels."""
    rows = []
    shapes = [Shape(3, 37, 5, 64), Shape(16, 512, 32, 512)][: 1 if setting.tiny else 2]
    kernels = ["eager", "triton"] if setting.device.type == "cuda" else ["eager"]
    for kernel in kernels:
        request_score_kernel(kernel)
        for shape in shapes:
            for dtype in _DTYPES:
                for precision in ("highest", "high") if dtype == torch.float32 else ("high",):
                    torch.set_float32_matmul_precision(precision)
                    for form in _FORMS if kernel == "eager" else ("image_gram",):
                        for budget in (0, 1 << 30):
                            options = {"form": form, "memory_budget": budget}
                            name = f"{kernel} {form} {tuple(shape)} {dtype} {precision} budget {budget}"
                            run = lambda s=shape, t=dtype, o=options: _errors(s, setting, t, **o)  # noqa: E731
                            rows.append(attempt(name, run))
    return rows


def _cost(shape: Shape, setting: Setting, dtype: torch.dtype, budget: int | None) -> dict[str, Any]:
    leaves, upstream = score_inputs(shape, setting.device, dtype)
    took = milliseconds(lambda: _step(leaves, upstream, memory_budget=budget), setting.device)
    peak = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else None
    return {"ms": took, "peak_bytes": peak}


def head_cost(setting: Setting) -> list[dict]:
    """Return the time of the eager scores, forward and backward, at the published shapes, by memory budget."""
    request_score_kernel("eager")
    torch.set_float32_matmul_precision("high")
    rows = []
    for name, shape in setting.shapes.items():
        budgets = (
            [1 << 20] if setting.tiny else [gib << 30 for gib in ((1, 2, 4, 16) if name == "llip_b16_k32" else (2,))]
        )
        for budget in budgets:
            run = lambda s=shape, b=budget: _cost(s, setting, torch.bfloat16, b)  # noqa: E731
            rows.append(attempt(f"{name} eager, budget {budget / 2**30:.3g} GiB", run))
    return rows


def _dense(leaves: list[Tensor], upstream: Tensor) -> None:
    """One step of the dense form in the precision of keys, over 16 images: a fraction of the pairs that fits."""
    keys, values, texts, query, out = leaves
    low = texts.to(keys.dtype)
    queries = (GAIN * low @ query.to(low.dtype).T).unflatten(1, (HEADS, -1)).permute(1, 2, 0)
    weights = torch.matmul(keys, queries[:, None]).softmax(dim=2)  # [M, B, K, T]
    mixed = torch.matmul(weights.transpose(2, 3), values).permute(1, 2, 0, 3).flatten(2)
    z = torch.nn.functional.normalize((mixed @ out.to(mixed.dtype).T).float(), dim=-1)
    (z * texts).sum(dim=-1).backward(upstream)


def _kernel_row(shape: Shape, setting: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {}
    leaves, upstream = score_inputs(shape, setting.device, torch.bfloat16)
    for kernel in ("eager", "triton") if setting.device.type == "cuda" else ("eager",):
        request_score_kernel(kernel)
        row[f"{kernel}_ms"] = milliseconds(lambda: _step(leaves, upstream), setting.device)
        first, second = (_step(leaves, upstream) for _ in range(2))
        row[f"{kernel}_deterministic"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    few = Shape(min(4, shape.images), *shape[1:])
    leaves, upstream = score_inputs(few, setting.device, torch.bfloat16)
    row["dense_bf16_ms"] = milliseconds(lambda: _dense(leaves, upstream), setting.device) * shape.images / few.images
    return row


def kernels(setting: Setting) -> list[dict]:
    """Return the time of kernels, eager tiles and a dense bf16 form (of few images, in proportion), and determinism."""
    torch.set_float32_matmul_precision("high")
    return [attempt(name, lambda shape=shape: _kernel_row(shape, setting)) for name, shape in setting.shapes.items()]
