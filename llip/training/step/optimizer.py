"""How a model is trained: AdamW with decay on matrices only, learning rates by step and by layer."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llip.configs import Config
from llip.open_clip.model import Llip
from llip.open_clip.towers.locks import blocks_above

_EMBEDDINGS = (
    *("class_embedding", "positional_embedding", "token_embedding.weight"),
    *("cls_token", "pos_embed", "reg_token", "attn_pool.latent"),  # timm's names
    *("head.latents", "head.positions"),  # of a mixture head
    *("embeddings.weight", "embed_tokens.weight", "relative_attention_bias.weight"),  # of transformers
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to gains, biases, embeddings, mixture tokens, logit scale and bias."""
    return parameter.ndim >= 2 and not name.endswith(_EMBEDDINGS)


class ParameterGroup(NamedTuple):
    """Parameters with the same weight decay and learning rate."""

    decays: bool
    lr_scale: float
    names: list[str]


def parameter_groups(model: Llip, config: Config) -> list[ParameterGroup]:
    """Return the trainable parameters by weight decay (matrices, and all else) and multiple of the learning rate.

    The order of groups and names is that of the optimizer's state in a checkpoint, where parameters have numbers only.
    """
    named = dict(model.named_parameters())
    above = blocks_above(model)
    groups: dict[tuple[bool, float], list[str]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            key = (decays(name, parameter), config.layer_decay ** above[name])
            groups.setdefault(key, []).append(name)
    ordered = sorted(groups, key=lambda key: (not key[0], -key[1]))
    return [ParameterGroup(*key, groups[key]) for key in ordered]


def create_optimizer(model: Llip, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters, in the groups of `parameter_groups`.

    The sharded parameters of a group (`engine_fsdp`) form a group apart: a fused kernel does not take both kinds.
    """
    named = dict(model.named_parameters())
    parts = []
    for group in parameter_groups(model, config):
        parameters = [named[name] for name in group.names]
        for sharded in (False, True):
            if alike := [parameter for parameter in parameters if isinstance(parameter, DTensor) == sharded]:
                decay = config.wd if group.decays else 0.0
                parts.append({"params": alike, "weight_decay": decay, "lr_scale": group.lr_scale})
    return torch.optim.AdamW(
        parts,
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
    )  # fmt: skip


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up to `lr`, then half a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = max(1, config.total_steps - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, (step - config.warmup) / span)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the step's learning rate `lr` in every group, times the group's own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
