"""The plan of a run: every part of it, with what was assumed.

Times are ranges from fast to slow: no run has been measured against them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.costs.flops import StepFlops, head_flops, image_tower, score_plan_of, step_flops
from llip.open_clip.factory import ModelSpec, model_spec
from llip.system.gpus import Gpu
from llip.tools.plan.advice import advise, fits
from llip.tools.plan.cache_size import CacheSize, cache_size
from llip.tools.plan.memory import Memory, gpu_memory
from llip.tools.plan.parameters import Parameters, count_parameters
from llip.tools.plan.score_bytes import ScorePart, score_parts
from llip.tools.plan.traffic import Traffic, step_traffic

BACKWARD_SHARE = 2 / 3  # of a step's FLOPs
BANDWIDTH_SHARES = (1.0, 0.84)
"""Shares of the data sheet's memory bandwidth that kernels reach, fast and slow: 3.35 and 2.8 TB/s on an H100."""

KERNEL_SHARES = (0.4, 0.2)
"""Shares of the GPU's peak that the score kernels and the products on their arrays are assumed to reach."""

_SMALL = 768  # width of an image tower
_MFU_SMALL, _MFU_LARGE = (0.21, 0.12), (0.39, 0.15)


def published_mfu(spec: ModelSpec) -> tuple[float, float]:
    """Return the range (high, low) of the MFU of published CLIP runs with image towers of this size.

    Samples per second and GPU, times 6 multiply-adds per sample and forward multiply-add, over the peak in bf16.
    OpenCLIP's scaling runs on A100s (LAION-AI/scaling-laws-openclip, trained_models_info.csv), best run of each size:
    B/32 12 %, B/16 16 %, L/14 30 % (most of them 12 to 18), H/14 15 %, g/14 17 %. NVIDIA's NeMo (user guide, CLIP
    performance), g/14 on one node: 39 % on A100s, 21 % on H100s.
    """
    return _MFU_SMALL if image_tower(spec).width <= _SMALL else _MFU_LARGE


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What cannot be known from the config.

    Attributes:
        mfu: range (high, low) of the share of the GPU's peak that the towers' FLOPs reach, recomputation included;
            None: `published_mfu`.
        network: bytes per second that one GPU can send to others.
        sample: bytes of one sample in the shards.
    """

    mfu: tuple[float, float] | None = None
    network: float = 50e9
    sample: float = 50e3

    def __post_init__(self) -> None:
        high, low = self.mfu or (1.0, 1.0)
        if not 0 < low <= high <= 1:
            raise UserError(f"--mfu {low:g}-{high:g}: expected LOW-HIGH, shares of the peak above 0 and up to 1")
        for name, value in (("--network", self.network), ("--sample-kb", self.sample)):
            if not value > 0:
                raise UserError(f"{name}: expected more than 0")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, at one end of the range."""

    towers: float
    score_parts: tuple[float, ...]  # of all pairs, forward and backward, in the order of `Plan.score_parts`
    network: float  # what is not hidden behind the backward pass

    @property
    def scores(self) -> float:
        """All of them."""
        return sum(self.score_parts)

    @property
    def total(self) -> float:
        """The step."""
        return self.towers + self.scores + self.network


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run on one kind of GPU. Bytes and seconds."""

    config: Config
    gpu: Gpu
    assumptions: Assumptions
    parameters: Parameters
    flops: StepFlops
    memory: Memory
    memory_other: Memory  # with checkpointing if the config goes without, and the other way round
    traffic: Traffic
    scores: str
    score_parts: list[ScorePart]
    times: tuple[StepTime, StepTime]  # fast, slow
    cache: CacheSize | None  # of frozen features, where the locks leave some
    advice: list[str]

    @property
    def score_bytes(self) -> int:
        """Of all parts of the scores."""
        return sum(part.bytes for part in self.score_parts)

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in the config's precision."""
        return _peak(self.config, self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the memory of one GPU is enough."""
        return fits(self.memory, self.gpu)

    @property
    def samples_per_second(self) -> tuple[float, float]:
        """Of the whole run, fast and slow, which storage and loaders must deliver."""
        return _pair(self.config.global_batch / time.total for time in self.times)

    @property
    def hours(self) -> tuple[float, float]:
        """Of the whole schedule, fast and slow."""
        return _pair(self.config.total_steps * time.total / 3600 for time in self.times)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for json."""
        config = self.config
        record = {
            "config": config.name,
            "gpu": dataclasses.asdict(self.gpu),
            "assumptions": dataclasses.asdict(self.assumptions),
            "gpus": config.processes,
            "nodes": config.nodes,
            "global_batch": config.global_batch,
            "steps": config.total_steps,
            "peak_flops": self.peak,
            "parameters": dataclasses.asdict(self.parameters) | {"total": self.parameters.total},
            "flops_per_image": dataclasses.asdict(self.flops)
            | {"model": self.flops.model, "executed": self.flops.executed},
            "memory_bytes": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "scores": self.scores,
            "fits": self.fits,
            "sent_bytes_per_step": dataclasses.asdict(self.traffic)
            | {"total": self.traffic.total, "exposed": self.traffic.exposed},
            "score_bytes_per_step": self.score_bytes,
            "score_parts": [
                dataclasses.asdict(part) | {"seconds": seconds}
                for part, *seconds in zip(self.score_parts, *(time.score_parts for time in self.times), strict=True)
            ],
            "towers_seconds_per_step": [time.towers for time in self.times],
            "scores_seconds_per_step": [time.scores for time in self.times],
            "network_seconds_per_step": [time.network for time in self.times],
            "seconds_per_step": [time.total for time in self.times],
            "samples_per_second": self.samples_per_second,
            "storage_bytes_per_second": [rate * self.assumptions.sample for rate in self.samples_per_second],
            "hours": self.hours,
            "gpu_hours": [hours * config.processes for hours in self.hours],
            "feature_cache": self.cache and dataclasses.asdict(self.cache) | {"total": self.cache.total},
            "advice": self.advice,
        }
        other = "memory_bytes_without_checkpointing" if config.grad_checkpointing else "memory_bytes_with_checkpointing"
        record[other] = dataclasses.asdict(self.memory_other) | {"total": self.memory_other.total}
        return record


def _pair(values: Iterable[float]) -> tuple[float, float]:
    fast, slow = values
    return fast, slow


def _peak(config: Config, gpu: Gpu) -> float:
    return gpu.single if config.precision == "fp32" else gpu.half


def make_plan(config: Config, gpu: Gpu, assumptions: Assumptions | None = None) -> Plan:
    """Return the plan of a run.

    Raises:
        UserError: names of the config that do not resolve.
    """
    spec = model_spec(config)
    assumptions = assumptions or Assumptions()
    assumptions = dataclasses.replace(assumptions, mfu=assumptions.mfu or published_mfu(spec))
    flops, parameters = step_flops(config), count_parameters(spec)
    traffic, plan = step_traffic(config, parameters.total), score_plan_of(config)
    parts = score_parts(config)

    def step_time(mfu: float, bandwidth: float, kernel_share: float) -> StepTime:
        rate, head = _peak(config, gpu) * mfu, head_flops(config, spec)
        executed_head = head.forward + head.backward + head.again
        towers = (config.batch_size * config.accum_freq * flops.executed - executed_head) / rate
        kernel_rate = _peak(config, gpu) * kernel_share
        scores = [part.seconds(gpu.bandwidth * bandwidth, kernel_rate if part.kernel else rate) for part in parts]
        hidden = BACKWARD_SHARE * (towers + sum(scores)) / config.accum_freq  # seconds that gradients may travel in
        late = max(0.0, traffic.overlapped / assumptions.network - hidden)
        return StepTime(towers, tuple(scores), traffic.exposed / assumptions.network + late)

    fast, slow = (
        step_time(*shares) for shares in zip(assumptions.mfu or (), BANDWIDTH_SHARES, KERNEL_SHARES, strict=True)
    )
    return Plan(
        config=config,
        gpu=gpu,
        assumptions=assumptions,
        parameters=parameters,
        flops=flops,
        memory=gpu_memory(config, parameters=parameters),
        memory_other=gpu_memory(config, not config.grad_checkpointing, parameters),
        traffic=traffic,
        scores=str(plan) if plan else "one feature per image, one product with all texts",
        score_parts=parts,
        times=(fast, slow),
        cache=cache_size(config, spec),
        advice=advise(config, gpu),
    )
