"""How a run's weights lie on its processes: whole on each of them here, in shares in `engine_sharded`.

The trainer, checkpoints and evaluation ask the engine, and do not know which one it is. Checkpoints are the same under
both, so a run may go on under the other one.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.system.processes import Processes
from llip.training.reporting.run_log import log
from llip.training.step.task import ContrastiveTask


class Engine:
    """Every process has all weights: one process alone, or several that average their gradients (DDP)."""

    def wrap(self, task: ContrastiveTask) -> nn.Module:
        """Return what to call in the place of `task`, so that gradients become those of all processes."""
        if task.processes.world_size == 1:
            return task
        devices = [task.processes.device] if task.processes.device.type == "cuda" else None
        return DistributedDataParallel(task, device_ids=devices, gradient_as_bucket_view=True)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm [] of all gradients, the same on every process. Every process must call it.

        Args:
            parameters: those that have a gradient.
        """
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])

    def clip_gradients(self, parameters: Sequence[nn.Parameter], largest: float, total: Tensor) -> None:
        """Scale the gradients down where their norm `total` [] is above `largest`."""
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, total)

    def model_state(self, model: Llip) -> dict[str, Tensor]:
        """Return the whole weights by name on the main process. Every process must call it."""
        return model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state that AdamW of a whole model has, on the main process. Every process must call it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Go back to what `optimizer_state` of any engine gave."""
        optimizer.load_state_dict(saved)

    def whole_model(self, model: Llip) -> Llip:
        """Return a model that each process can run at its own pace, on its device. Every process must call it."""
        return model

    def model_with_gradients(self, model: Llip) -> Llip:
        """Return a model with whole weights and gradients on the main process. Every process must call it."""
        return model


def create_engine(config: Config, model: Llip, processes: Processes) -> Engine:
    """Lay a model out as the config says, and let it be compiled where the config says so.

    To be called before the optimizer is made: what it has to hold are the parameters as they are afterwards.

    Args:
        config: the run.
        model: with the same weights on every process; changed in place.
        processes: of the run.

    Raises:
        UserError: there is nothing to compile with.
    """
    if config.torchcompile:
        _check_compiler(processes.device)
    if config.distributed_engine == "fsdp":
        if processes.world_size > 1:
            from llip.training.step.engine_fsdp import ShardedEngine

            return ShardedEngine(config, model, processes)
        log.info("distributed_engine=fsdp: a single process has nobody to share with, and keeps all weights")
    if config.torchcompile:
        model.visual.compile()
        model.text.compile()
    return Engine()


def _check_compiler(device: torch.device) -> None:
    """Say before the start what torch.compile would say in the first step."""
    if device.type != "cpu":
        return
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"torchcompile=true on a CPU needs a C++ compiler, and {', '.join(names)} is not on this machine; "
            "install one, name it in the environment variable CXX, or set torchcompile=false"
        )
