"""What to change where a run does not fit into a GPU's memory: each proposal is planned as well, and fits."""

from typing import Any

from llip.configs import Config
from llip.open_clip.factory import model_spec
from llip.system.gpus import Gpu
from llip.tools.plan.memory import Memory, gpu_memory
from llip.tools.plan.parameters import Parameters, count_parameters

_FIELDS = ("torchcompile", "grad_checkpointing", "distributed_engine", "batch_size", "accum_freq", "score_memory")


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Return whether a run fits into a GPU, the allowance for fragmentation aside."""
    return memory.total - memory.fragmentation <= gpu.memory


def _gib(value: int) -> str:
    return f"{value / 2**30:.1f} GiB"


def _smaller_batch(config: Config, memory: int, parameters: Parameters) -> Config:
    """Return the config with the largest `batch_size` that fits, `accum_freq` keeping the global batch; or as is."""
    images = config.batch_size * config.accum_freq
    for steps in range(config.accum_freq + 1, images + 1):
        if images % steps == 0:
            smaller = config.replace(batch_size=images // steps, accum_freq=steps)
            if gpu_memory(smaller, parameters=parameters).total <= memory:
                return smaller
    return config


def advise(config: Config, gpu: Gpu) -> list[str]:
    """Return what does not fit, and which fields to change so that it does; nothing where all fits.

    No proposal changes what is trained: the global batch stays.
    """
    parameters = count_parameters(model_spec(config))
    memory = gpu_memory(config, parameters=parameters)
    if memory.total <= gpu.memory:
        return []
    checkpointed, small_tiles = config.replace(grad_checkpointing=True), config.replace(score_memory=0.5)
    bases = [config.replace(torchcompile=True), checkpointed, small_tiles]
    if config.processes > 1 and config.ema_decay is None and config.precision != "amp_fp16":
        bases += [base.replace(distributed_engine="fsdp") for base in (config, checkpointed)]
    proposals = bases + [_smaller_batch(base, gpu.memory, parameters) for base in (config, *bases)]
    lines: list[str] = []
    fitting: list[set[tuple[str, Any]]] = []
    for proposal in proposals:
        total = gpu_memory(proposal, parameters=parameters).total
        changed = {
            (name, getattr(proposal, name)) for name in _FIELDS if getattr(proposal, name) != getattr(config, name)
        }
        if total > gpu.memory or not changed or any(less <= changed for less in fitting):
            continue  # no more changes than are needed
        fitting.append(changed)
        values = " ".join(f"{name}={str(getattr(proposal, name)).lower()}" for name in _FIELDS if name in dict(changed))
        lines.append(f"fits with {values}: {_gib(total)}")
    if not lines:
        fixed = memory.weights + memory.gradients + memory.optimizer
        lines = [
            f"no batch size fits: weights, gradients and optimizer take {_gib(fixed)}, scores {_gib(memory.scores)}; "
            "take a GPU with more memory, more GPUs (nodes), or a smaller model"
        ]
    verdict = f"{_gib(memory.total)} of {_gib(gpu.memory)} on {gpu.name}"
    if fits(memory, gpu):
        return [f"tight: {verdict}, with {_gib(memory.fragmentation)} assumed to be lost to fragmentation", *lines]
    return [f"does not fit: {verdict}", *lines]
