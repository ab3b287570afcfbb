"""What is trained and how: locked towers, AdamW with decay on matrices only, learning rates by step and by layer."""

import math
import re

import torch
from torch import nn

from llip.configs import Config
from llip.errors import UserError

_EMBEDDINGS = (
    *("class_embedding", "positional_embedding", "token_embedding.weight"),
    *("cls_token", "pos_embed", "reg_token", "attn_pool.latent"),  # timm's names
)
_BLOCK = re.compile(r"^(visual|text)\..*blocks\.(\d+)\.")
_STEM = re.compile(
    r"^(visual|text)\..*(conv1|patch_embed|embedding|pos_embed|cls_token|reg_token|ln_pre|norm_pre)(\.|$)"
)
_TOKENS = ("visual.class_embedding", "visual.trunk.cls_token", "visual.trunk.attn_pool.latent")


def lock_towers(model: nn.Module, config: Config) -> None:
    """Leave locked towers out of training.

    Raises:
        UserError: nothing is left to train.
    """
    several = config.mixture_tokens > 1
    for name, parameter in model.named_parameters():
        if (config.lock_image and name.startswith("visual.") and not (several and name in _TOKENS)) or (
            config.lock_text and name.startswith("text.")
        ):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lock_image and lock_text leave nothing to train")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: not to gains, biases, embeddings, mixture tokens, logit scale and bias."""
    return parameter.ndim >= 2 and not name.endswith(_EMBEDDINGS)


def blocks_above(names: list[str]) -> dict[str, int]:
    """Return for each parameter how many of its tower's blocks lie above it: 0 in the last block, and after it.

    What comes before the first block counts as one more below it; what belongs to no tower as none.
    """
    depth: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.match(name):
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    above = {}
    for name in names:
        if match := _BLOCK.match(name):
            above[name] = depth[match[1]] - 1 - int(match[2])
        elif match := _STEM.match(name):
            above[name] = depth.get(match[1], 0)
        else:
            above[name] = 0
    return above


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters.

    A group for each weight decay (matrices, and all else) and each multiple of the learning rate, `lr_scale`.
    """
    named = dict(model.named_parameters())
    above = blocks_above(list(named))
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            key = (decays(name, parameter), config.layer_decay ** above[name])
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups, key=lambda key: (not key[0], -key[1]))
    return torch.optim.AdamW(
        [
            {"params": groups[key], "weight_decay": config.wd if key[0] else 0.0, "lr_scale": key[1]}
            for key in ordered
        ],
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
