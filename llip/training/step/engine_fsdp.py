"""Weights, gradients and AdamW's state sharded over the processes (PyTorch's FSDP2): `distributed_engine=fsdp`.

Each block of the two towers is a unit, and the rest of a tower is another one. A unit's weights are gathered only while
it computes, forward and backward; its gradient is reduced and scattered as soon as it is there, for each micro-batch,
so that no process ever holds a full gradient. The pooling head, logit scale and logit bias are replicated and go
through DDP: they are small, are used outside of any forward hook (scores, mixture statistics), and a scalar cannot be
sharded.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llip.configs import Config
from llip.open_clip.model import Llip
from llip.system.processes import Processes
from llip.training.reporting.run_log import log
from llip.training.step.engine import Engine
from llip.training.step.optimizer import parameter_groups
from llip.training.step.task import ContrastiveTask

_BLOCK = re.compile(r"blocks\.\d+$")


class ShardedEngine(Engine):
    """Each process has a shard of the towers' weights, and all of the head's."""

    def __init__(self, config: Config, model: Llip, processes: Processes) -> None:
        """Shard the model's towers, in place.

        Args:
            config: the run; `torchcompile` compiles each block, between the hooks that gather its weights.
            model: with the same weights on every process, on its device.
            processes: more than one.
        """
        assert processes.world_size > 1, "one process has nothing to shard"
        self.processes = processes
        self.skeleton = _without_weights(model)
        self.groups = [group.names for group in parameter_groups(model, config)]  # as in a checkpoint
        _shard_towers(model, processes, config.torchcompile)
        self.parameters = dict(model.named_parameters())
        local = sum(_local(parameter).numel() for parameter in self.parameters.values())
        log.info("weights: %s of %s parameters on this process (FSDP2)", f"{local:,}", f"{_count(model):,}")

    def wrap(self, task: ContrastiveTask) -> DistributedDataParallel | ContrastiveTask:
        """See `Engine`: DDP for what is replicated; FSDP2's hooks do the rest.

        PyTorch has no public method to exclude parameters from DDP; the one used here is marked private.
        """
        sharded = [name for name, parameter in task.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, sharded)
        return super().wrap(task)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See `Engine`."""
        shards = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        replicated = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        square = torch.nn.utils.get_total_norm([shard for shard in shards if shard.numel()]).square()
        square = square.to(self.processes.device)  # a process may have no shard of anything
        dist.all_reduce(square)
        return (square + torch.nn.utils.get_total_norm(replicated).square()).sqrt()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], largest: float, total: Tensor) -> None:
        """See `Engine`."""
        factor = (largest / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], factor)

    def model_state(self, model: Llip) -> dict[str, Tensor]:
        """See `Engine`. On the CPU; empty on other processes than the main one."""
        return self._on_main(model.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See `Engine`. On the CPU; without moments on other processes than the main one."""
        settings = {
            id(parameter): {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        state: dict[int, dict[str, Tensor]] = {}
        groups, first = [], 0
        for names in self.groups:
            for index, name in enumerate(names, first):
                if moments := self._on_main(optimizer.state.get(self.parameters[name], {})):
                    state[index] = moments
            setting = settings[id(self.parameters[names[0]])]
            groups.append(setting | {"params": list(range(first, first + len(names)))})
            first += len(names)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """See `Engine`."""
        lengths = [len(group["params"]) for group in saved["param_groups"]]
        assert lengths == [len(names) for names in self.groups], "the checkpoint is of an optimizer of other parameters"
        places = {
            id(self.parameters[name]): (index, group)
            for names, group in zip(self.groups, saved["param_groups"], strict=True)
            for name, index in zip(names, group["params"], strict=True)
        }
        state, groups, first = {}, [], 0
        for group in optimizer.param_groups:
            for number, parameter in enumerate(group["params"], first):
                index, setting = places[id(parameter)]
                if index in saved["state"]:
                    state[number] = {key: _shard(value, parameter) for key, value in saved["state"][index].items()}
            groups.append(setting | {"params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def full_model(self, model: Llip) -> Llip:
        """See `Engine`. A copy, which takes the memory of all weights while it lives."""
        return self._filled({name: _full(tensor) for name, tensor in model.state_dict().items()})

    def model_with_gradients(self, model: Llip) -> Llip:
        """See `Engine`. A copy on the CPU; the sharded model itself on other processes than the main one."""
        weights = self.model_state(model)
        named = dict(model.named_parameters())
        gradients = self._on_main({name: p.grad for name, p in named.items() if p.grad is not None})
        if not self.processes.is_main:
            return model
        filled = self._filled(weights)
        for name, gradient in gradients.items():
            filled.get_parameter(name).grad = gradient
        return filled

    def _filled(self, weights: dict[str, Tensor]) -> Llip:
        model = copy.deepcopy(self.skeleton)
        model.load_state_dict(weights, assign=True)
        return model

    def _on_main(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the full tensors on the main process's CPU, nothing elsewhere; they are gathered one at a time."""
        gathered = {}
        for name, tensor in tensors.items():
            full = _full(tensor)
            if self.processes.is_main:
                gathered[name] = full.cpu()
        return gathered


def _shard_towers(model: Llip, processes: Processes, compiled: bool) -> None:
    # Weights are gathered and gradients averaged in float32, and autocast rounds in the same places as under DDP: the
    # two engines give equal losses, at twice the traffic of bfloat16. Autocast's bfloat16 copies of the weights stay
    # there from forward to backward, or to the end of the forward pass with grad_checkpointing.
    policy = MixedPrecisionPolicy()
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for tower in (model.visual, model.text):
        for name, module in tower.named_modules():
            if _BLOCK.search(name):
                if compiled:
                    module.forward = torch.compile(module.forward)  # the hooks, around it, stay as they are
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(tower, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _without_weights(model: Llip) -> Llip:
    """Return a copy of a model whose parameters have a shape and no memory."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _full(tensor: Tensor) -> Tensor:
    """Return the full tensor; every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or a replicated tensor itself; the memory is the tensor's."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(value: Tensor, like: nn.Parameter) -> Tensor:
    """Return this process's shard of a full `value`, as the parameter is sharded; counters are not."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
