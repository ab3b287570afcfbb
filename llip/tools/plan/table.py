"""A plan for people."""

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


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:{max(width, 30)}}  {value}" for name, value in rows), ""]


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    parts = vars(memory) | {"total": memory.total}
    return [(name.replace("_", " "), f"{_bytes(value):>10}") for name, value in parts.items()]


def as_table(plan: Plan) -> str:
    """Return the plan as text."""
    config, flops, traffic, parameters = plan.config, plan.flops, plan.traffic, plan.parameters
    head = (
        f"{config.name}: {config.model}, K = {config.mixture_tokens}, {config.pooling} pooling, {config.precision}\n"
        f"{config.processes} x {plan.gpu.name} on {config.nodes} node(s), {config.batch_size} pairs x "
        f"{config.accum_freq} slice(s) each: global batch {config.global_batch:,}\n"
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
             "beside the backward pass"),
            ("texts", f"{_bytes(traffic.texts):>10}  waited for"),
            ("text gradients", f"{_bytes(traffic.text_gradients):>10}  waited for"),
            ("softmax normalisers", f"{_bytes(traffic.normalisers):>10}  waited for"),
        ],
    )  # fmt: skip
    rate, sample = plan.samples_per_second, plan.assumptions.sample
    lines += _section(
        "time",
        [
            ("a step", f"{plan.step_seconds:.3f} s: {plan.compute_seconds:.3f} computing, {plan.network_seconds:.3f} "
             "waiting for the network"),
            ("samples/s from storage", f"{rate:,.0f} ({rate / config.nodes:,.0f} per node, "
             f"{_bytes(rate * sample)}/s in all)"),
            ("the schedule", f"{config.total_steps:,} steps, {config.total_steps * config.global_batch:,} pairs"),
            ("hours", f"{plan.hours:,.1f}"),
            ("GPU-hours", f"{plan.hours * config.processes:,.0f}"),
        ],
    )  # fmt: skip
    assumed = plan.assumptions
    lines.append(
        f"assumed: {100 * assumed.mfu:g} % of the peak of {_count(plan.peak)}FLOP/s, {assumed.network / 1e9:g} GB/s "
        f"from GPU to GPU, {assumed.sample / 1e3:g} kB a sample, no wait for data"
    )
    return "\n".join([*lines, *plan.advice] if plan.advice else [*lines, f"fits into {_bytes(plan.gpu.memory)}"])
