"""How a run's weights are distributed over its processes: replicated here, sharded in `engine_fsdp`.

Trainer, checkpoints and evaluation work with either engine. Checkpoints are the same, so a run may resume under the
other one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llip.open_clip.model import Llip
from llip.training.step.task import ContrastiveTask


class Engine:
    """Every process has all weights: one process alone, or several that average their gradients (DDP)."""

    def wrap(self, task: ContrastiveTask) -> DistributedDataParallel | ContrastiveTask:
        """Return the module to call instead of `task`, so that gradients are averaged over all processes."""
        if task.processes.world_size == 1:
            return task
        devices = [task.processes.device] if task.processes.device.type == "cuda" else None
        # other buffers than the statistics of batch norms are constants
        statistics = any(name.endswith("running_mean") for name, _ in task.named_buffers())
        return DistributedDataParallel(
            task, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=statistics
        )

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm [] of all gradients, the same on every process. Every process must call it.

        Args:
            parameters: those that have a gradient.
        """
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip_gradients(self, parameters: Sequence[nn.Parameter], largest: float, total: Tensor) -> None:
        """Scale the gradients down where their norm `total` [] is above `largest`."""
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, total)

    def model_state(self, model: Llip) -> dict[str, Tensor]:
        """Return the full weights by name on the main process. Every process must call it."""
        return model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of AdamW over the full model, on the main process. Every process must call it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Restore what `optimizer_state` of any engine returned."""
        optimizer.load_state_dict(saved)

    def full_model(self, model: Llip) -> Llip:
        """Return a model that each process can run at its own pace, on its device. Every process must call it."""
        return model

    def model_with_gradients(self, model: Llip) -> Llip:
        """Return a model with full weights and gradients on the main process. Every process must call it."""
        return model
