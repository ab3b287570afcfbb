"""AdamW with decay on matrices only, and the learning rate of a step."""

import math

import torch
from torch import nn

from llip.configs import Config

_EMBEDDINGS = ("class_embedding", "positional_embedding", "token_embedding.weight")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: not to gains, biases, embeddings, mixture tokens, logit scale and bias."""
    return parameter.ndim >= 2 and not name.endswith(_EMBEDDINGS)


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters, in two groups: with and without weight decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if decays(name, p)], "weight_decay": config.wd},
        {"params": [p for name, p in trainable if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up to `lr`, then half a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = max(1, config.total_steps - config.warmup)
    return 0.5 * config.lr * (1 + math.cos(math.pi * min(1.0, (step - config.warmup) / span)))
