"""A plan as text."""

from collections.abc import Iterable

from llip.tools.plan.estimate import Plan
from llip.tools.plan.memory import Memory


def _scaled(value: float, units: tuple[str, ...], step: float) -> str:
    for unit in units[:-1]:
        if abs(value) < step:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= step
    return f"{value:,.3g} {units[-1]}" if value < 1000 else f"{value:,.0f} {units[-1]}"


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def _count(value: float) -> str:
    return _scaled(value, ("", "K", "M", "G", "T", "P"), 1000)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _range(values: Iterable[float], form: str = ",.3g") -> str:
    """Return "fast - slow", or one number where the two read alike."""
    fast, slow = (format(value, form) for value in values)
    return fast if fast == slow else f"{fast} - {slow}"


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:{max(width, 30)}}  {value}" for name, value in rows), ""]


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    parts = vars(memory) | {"total": memory.total}
    return [(name.replace("_", " "), f"{_bytes(value):>10}") for name, value in parts.items()]


def _cache_rows(plan: Plan) -> list[str]:
    if (cache := plan.cache) is None:
        return []
    tokens, width = cache.shape
    captions = f"{_bytes(cache.captions):>10}  {plan.config.captions_per_image} of them"
    return _section(
        "features of the locked towers, encoded once (llip encode, fp16; int8 takes about half)",
        [
            ("an image", f"{_bytes(cache.image):>10}  {tokens:,} x {width:,}"),
            ("its captions", captions if cache.captions else "tokens, as ever: the text encoder is trained"),
            ("the data", f"{_bytes(cache.total):>10}  {cache.samples:,} samples"),
        ],
    )


def _score_rows(plan: Plan) -> list[str]:
    times = zip(*(time.score_parts for time in plan.times), strict=True)
    return _section(
        "scores by part, ms: predicted, not measured (fast - slow)",
        [(part.name, f"{_range(1e3 * end for end in ends):>12}  {_bytes(part.bytes):>10}  {_count(part.flops)}FLOP")
         for part, ends in zip(plan.score_parts, times, strict=True)],
    )  # fmt: skip


def as_table(plan: Plan) -> str:
    """Return the plan as text."""
    config, flops, traffic, parameters = plan.config, plan.flops, plan.traffic, plan.parameters
    head = (
        f"{config.name}: {config.model}, K = {config.mixture_tokens}, {config.pooling} pooling, {config.precision}\n"
        f"{config.processes} x {plan.gpu.name} on {config.nodes} node(s), {config.batch_size} images x "
        f"{config.accum_freq} each: global batch {config.global_batch:,}, {config.global_texts:,} captions\n"
    )
    lines = [head]
    lines += _section(
        "parameters",
        [(name.replace("_", " "), f"{getattr(parameters, name):>15,}")
         for name in ("image_tower", "mixture_tokens", "text_tower", "pooling", "other", "total")],
    )  # fmt: skip
    lines += _section(
        "FLOPs per image with its captions, forward and backward",
        [(name.replace("_", " "), f"{_count(getattr(flops, name)):>9}  {_share(getattr(flops, name), flops.model)}")
         for name in ("image_tower", "extra_tokens", "text_tower", "head", "model", "recomputed", "executed")],
    )  # fmt: skip
    lines += _section("memory of one GPU", _memory_rows(plan.memory))
    other = "without" if config.grad_checkpointing else "with"
    lines += [
        f"  total {other} gradient checkpointing: {_bytes(plan.memory_other.total)}",
        f"  scores: {plan.scores}",
        "",
    ]
    lines += _section(
        "sent by one GPU in a step",
        [
            ("gradients", f"{_bytes(traffic.gradients):>10}  {_share(traffic.overlapped, traffic.gradients)} of it "
             "during the backward pass"),
            ("texts", f"{_bytes(traffic.texts):>10}  waited for"),
            ("text gradients", f"{_bytes(traffic.text_gradients):>10}  waited for"),
            ("softmax normalisers", f"{_bytes(traffic.normalisers):>10}  waited for"),
        ],
    )  # fmt: skip
    (fast, slow), hours, assumed = plan.times, plan.hours, plan.assumptions
    rates = plan.samples_per_second
    lines += _section(
        "time: predicted, not measured (fast - slow)",
        [
            ("towers, s a step", _range((fast.towers, slow.towers))),
            ("scores", f"{_range((fast.scores, slow.scores))}, {_bytes(plan.score_bytes)} moved in memory"),
            ("network", f"{_range((fast.network, slow.network))} waited for"),
            ("a step", f"{_range((fast.total, slow.total))} s"),
            ("samples/s from storage", f"{_range(rates, ',.0f')} ({_range((r / config.nodes for r in rates), ',.0f')} "
             f"per node, {_bytes(rates[0] * assumed.sample)}/s in all)"),
            ("the schedule", f"{config.total_steps:,} steps, {config.total_steps * config.global_batch:,} pairs"),
            ("hours", _range(hours, ",.1f")),
            ("GPU-hours", _range((h * config.processes for h in hours), ",.0f")),
        ],
    )  # fmt: skip
    lines += _score_rows(plan)
    lines += _cache_rows(plan)
    mfu = _range((100 * share for share in assumed.mfu or ()), "g")
    lines.append(
        f"assumed: {mfu} % of the peak of {_count(plan.peak)}FLOP/s (--mfu), {assumed.network / 1e9:g} GB/s from GPU "
        f"to GPU, {assumed.sample / 1e3:g} kB a sample, no wait for data"
    )
    return "\n".join([*lines, *plan.advice] if plan.advice else [*lines, f"fits into {_bytes(plan.gpu.memory)}"])
