"""Exact tiled scores against dense ones: speed, error and memory. `python -m benchmarks.similarity [--json]`

Shapes: B images, T texts, K mixture tokens, M = 8 heads, D embedding width.

Three things are timed in turn, round by round, in one run: METHOD's equations in einsum over all pairs at once
("dense"), the same numbers through the fewest and largest matrix products that still form every z ("best dense"), and
this project's scores, with tiles kept for the backward pass, with tiles computed again, and without gradients. Dense
forms that do not fit into memory are named instead of run.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import benchmark_parser, in_fresh_process, peak_resident, seconds, set_up
from llip.errors import UserError
from llip.open_clip.pooling import TextConditionedPooling, create_pooling, unit_norm
from llip.open_clip.scores.plan import plan_scores
from llip.system.program import program

HEADS, TEMPERATURE = 8, 5.0
AMPLE, TIGHT = 16 << 30, 1 << 27  # memory budgets: everything is kept, no tile of the large shapes is
MEMORY_SHAPE = (16, 32, 512)  # B, K, D
MEMORY_TEXTS = (4_096, 32_768)


class Shape(NamedTuple):
    """B, T, K, D of one comparison."""

    images: int
    texts: int
    tokens: int
    width: int


SHAPES = [
    Shape(64, 1024, 32, 512),
    Shape(16, 4096, 32, 768),
    Shape(16, 4096, 64, 1024),
    Shape(16, 4096, 64, 512),
    Shape(64, 64, 32, 512),  # a small batch: no Gram matrix pays
    Shape(256, 256, 32, 512),
    Shape(16, 4096, 197, 512),  # the patches of ViT-B/16 and a class token
    Shape(16, 4096, 257, 768),  # ViT-L/14's
]
PRECISION_SHAPE = Shape(32, 256, 32, 512)


class Inputs(NamedTuple):
    """Head, mixture tokens [B, K, D], unit-norm texts [T, D], and a gradient of the scores [B, T]."""

    pooling: TextConditionedPooling
    h: Tensor
    t: Tensor
    upstream: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.h, self.t, *self.pooling.parameters()]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return seeded inputs with a head away from its start."""
    torch.manual_seed(0)
    pooling = create_pooling("text", shape.tokens, shape.width, HEADS, TEMPERATURE)
    for parameter in pooling.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter) * shape.width**-0.5
    h = torch.randn(shape.images, shape.tokens, shape.width)
    t = unit_norm(torch.randn(shape.texts, shape.width))
    upstream = torch.randn(shape.images, shape.texts)
    tensors = [x.to(device, dtype).requires_grad_() for x in (h, t)]
    return Inputs(pooling.to(device, dtype), *tensors, upstream.to(device, dtype))


def dense(inputs: Inputs) -> Tensor:
    """METHOD's equations, all pairs at once: scores [B, T]."""
    pooling, h, t, _ = inputs
    weights = torch.einsum("tmd,bmkd->btmk", pooling.queries(t), pooling.keys(h)).softmax(dim=-1)
    mixed = torch.einsum("btmk,bmkd->btmd", weights, pooling.values(h).to(weights.dtype)).flatten(2)
    z = unit_norm(torch.einsum("btd,ed->bte", mixed, pooling.out_proj.weight.to(mixed.dtype)))
    return torch.einsum("btd,td->bt", z, t)


def best_dense(inputs: Inputs) -> Tensor:
    """The same, heads first, so that every product is a large one and nothing is copied twice."""
    pooling, h, t, _ = inputs
    keys, values = (x.transpose(0, 1).contiguous() for x in (pooling.keys(h), pooling.values(h)))  # [M, B, K, d]
    queries = pooling.queries(t).permute(1, 2, 0)  # [M, d, T]
    logits = torch.bmm(keys.flatten(1, 2), queries).unflatten(1, keys.shape[1:3])  # [M, B, K, T]
    weights = logits.softmax(dim=2).transpose(2, 3)
    mixed = torch.matmul(weights, values).permute(1, 2, 0, 3).flatten(2)  # [B, T, D]
    z = torch.nn.functional.linear(mixed, pooling.out_proj.weight)
    return (z * t).sum(dim=-1) / z.square().sum(dim=-1).clamp_min(1e-12).sqrt()


def tiled(budget: int | None) -> Callable[[Inputs], Tensor]:
    """This project's scores with a memory budget in bytes."""
    return lambda inputs: inputs.pooling.scores(inputs.h, inputs.t, budget)


def train_step(score: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Forward and backward; returns the scores."""
    for leaf in inputs.leaves():
        leaf.grad = None
    scores = score(inputs)
    scores.backward(inputs.upstream.to(scores.dtype))
    return scores.detach()


@torch.no_grad()
def evaluate(score: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Forward alone."""
    return score(inputs)


FORMS = {
    "dense": (dense, train_step),
    "best_dense": (best_dense, train_step),
    "tiled": (tiled(None), train_step),
    "ample": (tiled(AMPLE), train_step),
    "recomputed": (tiled(TIGHT), train_step),
    "dense_no_grad": (dense, evaluate),
    "best_dense_no_grad": (best_dense, evaluate),
    "tiled_no_grad": (tiled(None), evaluate),
}


def dense_fits(shape: Shape, device: torch.device) -> bool:
    """Return whether the dense forms' forward and backward pass fits into the memory that is free.

    At their peak they hold six arrays of the size of the weights [B, T, M, K] and six of the features [B, T, D].
    """
    needed = 6 * 4 * shape.images * shape.texts * (HEADS * shape.tokens + shape.width)
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info()[0]
    return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ratio(slower: float | None, faster: float | None) -> float | None:
    """Return how many times faster the second is, None where the first was not run."""
    return None if slower is None or faster is None else round(slower / faster, 3)


def time_shape(shape: Shape, rounds: int, device: torch.device, progress: tqdm) -> dict:
    """Time every form on one shape, in turn; medians, and ratios of medians. None: a dense form that does not fit."""
    inputs, fits = make_inputs(shape, device), dense_fits(shape, device)
    times: dict[str, list[float]] = {name: [] for name in FORMS if fits or "dense" not in name}
    for repeat in range(rounds + 1):
        for name in times:
            score, run = FORMS[name]
            took = seconds(lambda score=score, run=run: run(score, inputs), device)
            progress.update()
            if repeat:  # the first round warms up
                times[name].append(took)
    taken: dict[str, float | None] = dict.fromkeys(FORMS)
    taken |= {name: statistics.median(values) for name, values in times.items()}
    best = min(taken["dense"] or 0, taken["best_dense"] or 0) if fits else None
    plan = plan_scores(
        shape.images, shape.texts, shape.tokens, HEADS, shape.width, training=True, on_cpu=device.type == "cpu"
    )
    few = inputs._replace(t=inputs.t[: 2**20 // (shape.images * shape.tokens) + 1])
    error = (evaluate(tiled(None), few) - evaluate(dense, few)).abs().max().item()
    return {
        "shape": shape._asdict(),
        "form": plan.form,
        **{f"{name}_seconds": value and round(value, 5) for name, value in taken.items()},
        "ratio": ratio(taken["dense"], taken["tiled"]),
        "ratio_best_dense": ratio(taken["best_dense"], taken["tiled"]),
        "ratio_ample": ratio(best, taken["ample"]),
        "ratio_recomputed": ratio(taken["dense"], taken["recomputed"]),
        "ratio_no_grad": ratio(taken["dense_no_grad"], taken["tiled_no_grad"]),
        "pairs_per_second_no_grad": round(shape.images * shape.texts / statistics.median(times["tiled_no_grad"])),
        "peak_bytes": plan.peak_bytes,
        "max_error": error,
    }


def measure_errors(device: torch.device) -> list[dict]:
    """Root mean square error of scores and gradients against float64, of the dense form and of the tiled one."""
    exact_inputs = make_inputs(PRECISION_SHAPE, device, torch.float64)
    exact = [train_step(dense, exact_inputs), *(leaf.grad for leaf in exact_inputs.leaves())]
    names = ["scores", "tokens", "texts", "W_Q", "W_K", "W_V", "W_O"]
    inputs = make_inputs(PRECISION_SHAPE, device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors = []
        for score in (dense, tiled(None)):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                scores = score(inputs)
            for leaf in inputs.leaves():
                leaf.grad = None
            scores.backward(inputs.upstream.to(scores.dtype))
            computed = [scores.detach(), *(leaf.grad for leaf in inputs.leaves())]
            errors.append(
                [
                    ((a - b).square().mean() / b.square().mean()).sqrt().item()
                    for a, b in zip(computed, exact, strict=True)
                ]
            )
        for name, ours, theirs in zip(names, errors[1], errors[0], strict=True):
            rows.append(
                {"dtype": str(dtype).removeprefix("torch."), "of": name, "dense": theirs, "tiled": ours,
                 "ratio": round(ours / theirs, 3)}
            )  # fmt: skip
    return rows


def memory_of(texts: int) -> int:
    """Return the peak resident set, in bytes, of this process after forward and backward with that many texts."""
    images, tokens, width = MEMORY_SHAPE
    inputs = make_inputs(Shape(images, texts, tokens, width), torch.device("cpu"))
    train_step(tiled(None), inputs)
    return peak_resident()


def measure_memory() -> dict:
    """Peak memory with few and with many texts, each in a separate process, and the growth that is allowed."""
    peaks = [in_fresh_process("benchmarks.similarity", "--memory-of", texts, timeout=600) for texts in MEMORY_TEXTS]
    images, _, width = MEMORY_SHAPE
    added = MEMORY_TEXTS[1] - MEMORY_TEXTS[0]
    allowed = 1.1 * peaks[0] + 4 * added * width * 4 + 3 * images * added * 4
    return {"texts": MEMORY_TEXTS, "peak_bytes": peaks, "allowed_bytes": round(allowed), "bounded": peaks[1] <= allowed}


def as_tables(results: dict) -> str:
    """Return the results for people."""
    lines = ["| B | T | K | D | dense s | best dense s | tiled s | ratio | to best | again | no grad | pairs/s |"]
    lines.append("|" + "---|" * 12)
    columns = ["dense_seconds", "best_dense_seconds", "tiled_seconds"]
    columns += ["ratio", "ratio_best_dense", "ratio_recomputed", "ratio_no_grad"]
    for row in results["shapes"]:
        numbers = ["does not fit" if row[name] is None else f"{row[name]:.3f}" for name in columns]
        cells = [*map(str, row["shape"].values()), *numbers, f"{row['pairs_per_second_no_grad']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "relative error against float64 (root mean square): dense, tiled, ratio"]
    for row in results["errors"]:
        lines.append(f"{row['dtype']:>9} {row['of']:>7}  {row['dense']:.1e}  {row['tiled']:.1e}  {row['ratio']:.2f}")
    if memory := results.get("memory"):
        small, large = (f"{peak / 2**20:,.0f} MiB" for peak in memory["peak_bytes"])
        lines += ["", f"peak memory: {small} with {memory['texts'][0]:,} texts, {large} with {memory['texts'][1]:,}"]
        lines[-1] += f" (allowed: {memory['allowed_bytes'] / 2**20:,.0f} MiB)"
    return "\n".join(lines)


@program
def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = benchmark_parser("similarity", __doc__)
    parser.add_argument("--shape", nargs=4, type=int, action="append", metavar=("B", "T", "K", "D"))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after a warm-up")
    parser.add_argument("--memory-of", type=int, metavar="T", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for shape in options.shape or []:
        if min(shape) < 1 or shape[3] % HEADS:
            raise UserError(f"--shape {' '.join(map(str, shape))}: expected 1 or more, and D divisible by {HEADS}")
    device = set_up(options)
    if device.type == "cuda":  # as training does
        torch.set_float32_matmul_precision("high")
    if options.memory_of:
        print(memory_of(options.memory_of))
        return
    shapes = [Shape(*shape) for shape in options.shape or SHAPES]
    with tqdm(total=len(shapes) * (options.rounds + 1) * len(FORMS), unit="run", file=sys.stderr) as progress:
        results = {"device": options.device, "threads": options.threads, "shapes": []}
        for shape in shapes:
            progress.set_description("x".join(map(str, shape)))
            results["shapes"].append(time_shape(shape, options.rounds, device, progress))
    results["errors"] = measure_errors(device)
    if device.type == "cpu":
        results["memory"] = measure_memory()
    print(json.dumps(results) if options.json else as_tables(results))


if __name__ == "__main__":
    sys.exit(main())
