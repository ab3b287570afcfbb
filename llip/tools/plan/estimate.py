"""The whole plan of a run: everything put together, with what was assumed beside it."""

import dataclasses
from typing import Any

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.costs.flops import StepFlops, score_plan_of, step_flops
from llip.open_clip.factory import model_spec
from llip.system.gpus import Gpu
from llip.tools.plan.advice import advise
from llip.tools.plan.memory import Memory, gpu_memory
from llip.tools.plan.parameters import Parameters, count_parameters
from llip.tools.plan.traffic import Traffic, step_traffic

BACKWARD_SHARE = 2 / 3  # of a step's FLOPs


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What cannot be known from the config.

    Attributes:
        mfu: share of the GPU's peak that executed FLOPs reach, recomputation included.
        network: bytes per second that one GPU can send to others.
        sample: bytes of one sample in the shards.
    """

    mfu: float = 0.35
    network: float = 50e9
    sample: float = 50e3

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu}: expected a share of the peak, more than 0 and at most 1")
        for name, value in (("--network", self.network), ("--sample-kb", self.sample)):
            if not value > 0:
                raise UserError(f"{name}: expected more than 0")


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
    compute_seconds: float
    network_seconds: float
    step_seconds: float
    advice: list[str]

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in the config's precision."""
        return _peak(self.config, self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the memory of one GPU is enough."""
        return self.memory.total <= self.gpu.memory

    @property
    def samples_per_second(self) -> float:
        """Of the whole run, which storage and loaders must deliver."""
        return self.config.global_batch / self.step_seconds

    @property
    def hours(self) -> float:
        """Of the whole schedule."""
        return self.config.total_steps * self.step_seconds / 3600

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
            "compute_seconds_per_step": self.compute_seconds,
            "network_seconds_per_step": self.network_seconds,
            "seconds_per_step": self.step_seconds,
            "samples_per_second": self.samples_per_second,
            "storage_bytes_per_second": self.samples_per_second * self.assumptions.sample,
            "hours": self.hours,
            "gpu_hours": self.hours * config.processes,
            "advice": self.advice,
        }
        other = "memory_bytes_without_checkpointing" if config.grad_checkpointing else "memory_bytes_with_checkpointing"
        record[other] = dataclasses.asdict(self.memory_other) | {"total": self.memory_other.total}
        return record


def _peak(config: Config, gpu: Gpu) -> float:
    return gpu.single if config.precision == "fp32" else gpu.half


def make_plan(config: Config, gpu: Gpu, assumptions: Assumptions | None = None) -> Plan:
    """Return the plan of a run.

    Raises:
        UserError: names of the config that do not resolve.
    """
    assumptions = assumptions or Assumptions()
    flops, parameters = step_flops(config), count_parameters(model_spec(config))
    traffic, scores = step_traffic(config, parameters.total), score_plan_of(config)
    compute = config.batch_size * config.accum_freq * flops.executed / (_peak(config, gpu) * assumptions.mfu)
    hidden = BACKWARD_SHARE * compute / config.accum_freq  # seconds that gradients may travel in
    late = max(0.0, traffic.overlapped / assumptions.network - hidden)
    network = traffic.exposed / assumptions.network + late
    return Plan(
        config=config,
        gpu=gpu,
        assumptions=assumptions,
        parameters=parameters,
        flops=flops,
        memory=gpu_memory(config, parameters=parameters),
        memory_other=gpu_memory(config, not config.grad_checkpointing, parameters),
        traffic=traffic,
        scores=str(scores) if scores else "one feature per image, one product with all texts",
        compute_seconds=compute,
        network_seconds=network,
        step_seconds=compute + network,
        advice=advise(config, gpu),
    )
