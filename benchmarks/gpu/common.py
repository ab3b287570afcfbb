"""What the sections share: shapes, inputs of the scores, a clock, and measurements that may fail one by one."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADS = 8


class Shape(NamedTuple):
    """B images of a process, T texts, K mixture tokens, D width."""

    images: int
    texts: int
    tokens: int
    width: int


PUBLISHED = {
    "llip_b32_k64": Shape(256, 32_768, 64, 512),
    "llip_b16_k32": Shape(256, 32_768, 32, 512),
    "llip_l14_k32": Shape(256, 32_768, 32, 768),
    "llip_G14_k64": Shape(128, 32_768, 64, 1280),
}
TINY = {"tiny": Shape(4, 96, 4, 32)}


class Setting(NamedTuple):
    """Where a section runs, and whether on tiny shapes."""

    device: torch.device
    tiny: bool

    @property
    def shapes(self) -> dict[str, Shape]:
        """The published shapes, or a tiny one."""
        return TINY if self.tiny else PUBLISHED


def score_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the tensor arguments of `pairwise_scores`, keys and values in `dtype`, and a gradient of the scores."""
    torch.manual_seed(0)
    images, texts, tokens, width = shape
    by_head = (HEADS, images, tokens, width // HEADS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = (torch.randn(by_head, device=device).to(dtype) for _ in range(2))
    text = torch.nn.functional.normalize(torch.randn(texts, width, device=device).to(wide), dim=-1)
    weights = [
        torch.eye(width, device=device) + width**-0.5 * torch.randn(width, width, device=device) for _ in range(2)
    ]
    leaves = [keys, values, text, *(weight.to(wide) for weight in weights)]
    return [leaf.requires_grad_() for leaf in leaves], torch.randn(images, texts, device=device).to(wide)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of `run` after two calls that warm up: by CUDA events on a GPU."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a row with what `measure` returns, or with its error: one failure does not end a section."""
    try:
        row = measure()
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"name": name} | row


def relative(measured: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `exact`."""
    return ((measured.double() - exact).norm() / exact.norm()).item()
