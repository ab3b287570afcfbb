"""What is trained and how: locked towers, AdamW with decay on matrices only, learning rates by step and by layer."""

import math
import re
from typing import Any, NamedTuple

import torch
from timm.models import group_parameters
from torch import nn
from torch.distributed.tensor import DTensor

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.open_clip.towers.backbone import BackboneTower

_EMBEDDINGS = (
    *("class_embedding", "positional_embedding", "token_embedding.weight"),
    *("cls_token", "pos_embed", "reg_token", "attn_pool.latent"),  # timm's names
    *("head.latents", "head.positions"),  # of a mixture head
    *("embeddings.weight", "embed_tokens.weight", "relative_attention_bias.weight"),  # of transformers
)
_BLOCK = re.compile(r"^(visual|text)\..*blocks\.(\d+)\.")
_HF_BLOCK = re.compile(r"^(text)\.transformer\.(?:encoder\.)?(?:layers?|block)\.(\d+)\.")
_STEM = re.compile(
    r"^(visual|text)\..*(conv1|patch_embed|embedding|pos_embed|cls_token|reg_token|ln_pre|norm_pre"
    r"|embeddings|embed_tokens)(\.|$)"
)
_TOKENS = (
    *("visual.class_embedding", "visual.trunk.cls_token", "visual.trunk.attn_pool.latent"),
    "visual.head.latents",
)
_WITH_THE_LAST = (99999,)  # timm: no group apart; for what its matchers count to no block
_BACKBONE = "visual.trunk."
_TEXT_PROJECTION = ("text.text_projection", "text.proj.")


def lock_towers(model: Llip, config: Config) -> None:
    """Freeze what the config locks: `lock_image` and `lock_text`.

    Raises:
        UserError: the model does not have such a part, or nothing is left to train.
    """
    above, lock = blocks_above(model), config.lock_image
    _check_lock(model, above, lock)
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            locked = _locks_image(name, above[name], lock, several=config.mixture_tokens > 1)
        else:
            locked = name.startswith("text.") and (
                config.lock_text is True or (config.lock_text == "encoder" and not name.startswith(_TEXT_PROJECTION))
            )
        if locked:
            parameter.requires_grad_(False)
    model.train(model.training)  # locked parts are in eval mode
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lock_image and lock_text leave nothing to train")


def _locks_image(name: str, above: int, lock: bool | int | str, several: bool) -> bool:
    """Return whether a parameter of the image tower is locked; its tokens never are, where it has several."""
    if lock == "backbone":
        return name.startswith(_BACKBONE)
    if several and name in _TOKENS:
        return False
    return lock if isinstance(lock, bool) else above >= int(lock)


def _check_lock(model: Llip, above: dict[str, int], lock: bool | int | str) -> None:
    if lock == "backbone" and not isinstance(model.visual, BackboneTower):
        raise UserError("lock_image=backbone: the model has no mixture_head; set lock_image=true, or N blocks to train")
    blocks = max(count for name, count in above.items() if name.startswith("visual."))
    if isinstance(lock, int) and lock > blocks:
        raise UserError(f"lock_image = {lock}: the image tower has {blocks} blocks; set fewer, or lock_image=false")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to gains, biases, embeddings, mixture tokens, logit scale and bias."""
    return parameter.ndim >= 2 and not name.endswith(_EMBEDDINGS)


def _blocks_above_in_backbone(trunk: Any) -> dict[str, int]:
    """Return for each parameter of a timm model how many of timm's blocks lie above it."""
    matcher = dict(trunk.group_matcher(coarse=False))
    blocks = matcher["blocks"] if isinstance(matcher["blocks"], list) else [(matcher["blocks"], None)]
    matcher["blocks"] = [*blocks, (".*", _WITH_THE_LAST)]
    groups = group_parameters(trunk, matcher)
    return {name: max(groups) - group for group, names in groups.items() for name in names}


def blocks_above(model: Llip) -> dict[str, int]:
    """Return for each parameter how many of its tower's blocks lie above it: 0 in the last block, and after it.

    The stem counts as one more block below the first; what belongs to no tower has none above it. The blocks of a
    backbone are those of timm's `group_matcher`; its mixture head comes after them.
    """
    names = [name for name, _ in model.named_parameters()]
    matches = {name: _BLOCK.match(name) or _HF_BLOCK.match(name) for name in names}
    depth: dict[str, int] = {}
    for match in filter(None, matches.values()):
        depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    above = dict.fromkeys(names, 0)
    for name in names:
        if block := matches[name]:
            above[name] = depth[block[1]] - 1 - int(block[2])
        elif stem := _STEM.match(name):
            above[name] = depth.get(stem[1], 0)
    if isinstance(model.visual, BackboneTower):
        trunk = _blocks_above_in_backbone(model.visual.trunk)
        above |= {name: trunk.get(name.removeprefix(_BACKBONE), 0) for name in names if name.startswith("visual.")}
    return above


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
