"""Who computes the scores: what was asked for, what the machine has, and a comparison of the kernels with eager tiles.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d, e widths of a head of keys and values.

Triton is imported only where its kernels may run: on CUDA, or in its interpreter (TRITON_INTERPRET=1) on request.
"""

import functools
import importlib.util
import logging
import os
import time

import torch
from torch import Tensor

from llip.errors import UserError
from llip.open_clip.kernels.blocks import HeadShape, unsupported
from llip.open_clip.scores.eager import eager_scores
from llip.open_clip.scores.inputs import ScoreInputs
from llip.open_clip.scores.plan import Kernel, plan_scores

log = logging.getLogger("llip")

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TF32_TOLERANCE = 5e-3
"""Norms of differences to eager, of scores and of each gradient: about four times the errors that tests measure."""

_request = "auto"


def request_score_kernel(name: str) -> None:
    """Set who computes the scores of this process from now on: a config's `score_kernel`."""
    global _request
    _request = name


def planned_kernel(request: str, shape: HeadShape) -> Kernel:
    """Return who will compute the scores on a CUDA device, as far as that is known without one."""
    if request == "eager":
        return Kernel("eager", "as set")
    reason = unsupported(shape)
    return Kernel("eager", reason) if reason else Kernel("triton", "if they agree with eager at the start")


@torch.compiler.disable
def choose_kernel(device: torch.device, dtype: torch.dtype, shape: HeadShape) -> Kernel | None:
    """Return who computes the scores; None on a CPU that was not asked for kernels.

    The first call for a shape compiles the kernels, which takes seconds unless Triton's cache on disk has them, and
    compares them with eager on a small random case.

    Raises:
        UserError: `score_kernel=triton`, and the kernels cannot run, or do not agree with eager.
    """
    if _request == "eager" or (_request == "auto" and device.type != "cuda"):
        return Kernel("eager", "as set") if device.type == "cuda" else None
    reason = _unavailable(device) or unsupported(shape)
    if reason is None:
        agrees, reason = _compare(device, dtype, shape, torch.get_float32_matmul_precision())
        if agrees:
            return Kernel("triton", reason)
    if _request == "triton":
        raise UserError(f"config field score_kernel = 'triton': {reason}; set score_kernel=auto")
    return Kernel("eager", reason)


def _unavailable(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on a device; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and the scores are on the {device.type.upper()}"
    if torch.version.hip:
        return "the kernels were written for NVIDIA's GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}, below 8.0"


@functools.cache
def _compare(device: torch.device, dtype: torch.dtype, shape: HeadShape, matmul_precision: str) -> tuple[bool, str]:
    """Return whether the kernels agree with eager, and the figures; if not, log them once."""
    start = time.monotonic()
    tf32 = dtype == torch.float32 and matmul_precision != "highest"
    tolerance = _TF32_TOLERANCE if tf32 else _TOLERANCES[dtype]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            worst, equal = _errors(device, dtype, shape)
    except Exception as error:  # whatever a compiler or a driver raises
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"the kernels fail with {type(error).__name__}: {first_line}"
    else:
        reason = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        reason = f"relative difference to eager: {reason}"
        if not equal:
            reason += "; a second run gives other bits"
        elif max(worst.values()) < tolerance:  # false for NaN
            log.debug("Triton kernels compared with eager in %.2f s", time.monotonic() - start)
            return True, reason
    log.warning("scores are computed in eager: %s (allowed: %g)", reason, tolerance)
    return False, reason


def _errors(device: torch.device, dtype: torch.dtype, shape: HeadShape) -> tuple[dict[str, float], bool]:
    """Return relative differences between kernels and eager on a small random case, and whether two runs are equal."""
    from llip.open_clip.kernels.launch import kernel_scores

    images, texts = (17, 300) if device.type == "cuda" else (2, 20)  # several tiles of each program; the interpreter
    width = shape.heads * shape.key_size
    random = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=random)).to(device).requires_grad_()

    by_head = (shape.heads, images, shape.tokens)
    tokens = [normal(*by_head, size).detach().to(dtype) for size in (shape.key_size, shape.value_size)]
    weights = normal(width, width, std=width**-0.5), normal(width, shape.heads * shape.value_size, std=width**-0.5)
    keys, values = (x.requires_grad_() for x in tokens)
    leaves = (keys, values, normal(texts, width), *weights)
    upstream = normal(images, texts).detach()
    plan = plan_scores(
        images, texts, shape.tokens, shape.heads, width, training=True, on_cpu=device.type == "cpu",
        form="image_gram", itemsize=shape.itemsize, kernel=Kernel("triton", ""),
    )  # fmt: skip

    def run(kernel: bool) -> list[Tensor]:
        inputs = ScoreInputs(*leaves, shared=weights[1].T @ weights[1])
        scores = kernel_scores(inputs, plan, True, programs=8) if kernel else eager_scores(inputs, plan, True)
        return [scores.detach(), *torch.autograd.grad(scores, leaves, upstream)]

    eager, first, second = run(False), run(True), run(True)
    names = ("scores", "keys", "values", "texts", "W_Q", "W_O")
    differences = {
        name: ((x.float() - y.float()).norm() / y.float().norm()).item()
        for name, x, y in zip(names, first, eager, strict=True)
    }
    return differences, all(map(torch.equal, first, second))
