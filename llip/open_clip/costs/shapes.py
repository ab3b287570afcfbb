"""The shape of one transformer, and that of a tower from timm, which is read off the tower itself.

Shapes: N tokens of a tower, W its width, D embedding width, K mixture tokens, L patches.
"""

import dataclasses
import functools
import json
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llip.open_clip.architecture import build_towers
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.model import Llip
from llip.open_clip.towers.locks import LockImage, LockText, lock_towers

_HIDDEN = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "hidden_dim")  # names in `transformers`


@dataclasses.dataclass(frozen=True)
class Tower:
    """The shape of one transformer."""

    tokens: int  # N
    width: int  # W
    layers: int
    heads: int
    hidden: int  # width of the MLP
    stem: int  # FLOPs before the blocks, whose input needs no gradient
    projected: int  # outputs that are projected to D
    embedding: int  # D
    counted: int = 0  # FLOPs of one sample forward, where they were counted by running and not by these shapes
    counted_backward: int | None = None  # of a tower with locked parts, or with a backbone
    backbone: int = 0  # FLOPs of one sample forward below a mixture head
    kept: int = 0  # numbers that a backbone keeps of one sample for the backward pass

    @property
    def block(self) -> int:
        """FLOPs of one block, forward."""
        tokens, width = self.tokens, self.width
        return 2 * tokens * width * (4 * width + 2 * self.hidden) + self.attention

    @property
    def attention(self) -> int:
        """FLOPs of one block's products of tokens with tokens, forward."""
        return 4 * self.tokens**2 * self.width

    @property
    def forward(self) -> int:
        """FLOPs of one sample, forward."""
        return self.counted or self.stem + self.layers * self.block + 2 * self.projected * self.width * self.embedding

    @property
    def backward(self) -> int:
        """FLOPs of one sample, backward: two products for each, one for the stem; less where parts are locked."""
        return 2 * self.forward - self.stem if self.counted_backward is None else self.counted_backward

    def locked(self, lock: LockImage | LockText, several_tokens: bool = False) -> "Tower":
        """Return this tower with the FLOPs of a backward pass under `lock`.

        Gradients of weights are formed above the lock alone; those of inputs down to there, or in all blocks where
        mixture tokens below are trained.
        """
        if lock is False:
            return self
        projection = 2 * self.projected * self.width * self.embedding
        blocks = 0 if isinstance(lock, bool) or not isinstance(lock, int) else lock
        weights = blocks * self.block + (0 if lock is True else projection)
        inputs = blocks * self.block + (projection if blocks else 0)
        if several_tokens:  # attention has two inputs, and no weights
            inputs = self.forward - self.stem + (self.layers - blocks) * self.attention
        return dataclasses.replace(self, counted_backward=weights + inputs)


def kept_patches(patches: int, dropout: float) -> int:
    """Return how many patches a tower works on in training."""
    return patches if dropout == 0 else max(1, int(patches * (1 - dropout)))


def meta_model(spec: ModelSpec) -> Llip:
    """Build a model without memory: it has shapes and no numbers."""
    with torch.device("meta"):
        return create_model(spec)


def fewest_tokens(spec: ModelSpec) -> int:
    """Return the number of prefix tokens in the source of the image tower: 1 unless it has registers."""
    vision = spec.architecture["vision_cfg"]
    if not vision.get("timm_model_name") or vision.get("timm_pool") == "map" or "mixture_head" in spec.architecture:
        return 1
    with torch.device("meta"):
        return build_towers(spec.architecture).visual.trunk.num_prefix_tokens


def timm_image_tower(spec: ModelSpec) -> Tower:
    """Return the image tower of a model whose tower comes from timm."""
    return _timm_image_tower(json.dumps(spec.to_dict()))


def backbone_tower(spec: ModelSpec, lock: LockImage = False) -> Tower:
    """Return the image tower of a model with a mixture head; its blocks are the head's.

    The tower runs without memory, with the parts locked as in the run. PyTorch's counter takes the backward pass of a
    depthwise convolution for that of a dense one; so the backward pass of the backbone counts as twice the forward
    pass of what is trained in it.
    """
    return _backbone_tower(json.dumps(spec.to_dict()), json.dumps(lock))


@functools.cache  # seconds, and asked for several times
def _backbone_tower(described: str, described_lock: str) -> Tower:
    lock: LockImage = json.loads(described_lock)
    spec, count = ModelSpec(**json.loads(described)), 2  # images: BatchNorm in training wants more than one value
    model = meta_model(spec).train()
    lock_towers(model, lock, False)
    visual: Any = model.visual
    images = torch.empty(count, 3, spec.image_size, spec.image_size, device="meta")
    kept, parameters = 0, set(map(id, visual.parameters()))

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if id(tensor) in parameters else tensor.numel()
        return tensor

    with FlopCounterMode(display=False) as backbone, saved_tensors_hooks(keep, lambda tensor: tensor):
        trained = _count_trained(visual.trunk, backbone)
        features = visual.frozen_features(images)
    with FlopCounterMode(display=False) as head:
        visual.from_features(features)
    below, above = backbone.get_total_flops() // count, head.get_total_flops() // count
    width, block = visual.head.proj.in_features, visual.head.blocks[0]
    tower = Tower(
        tokens=spec.mixture_tokens + features.shape[1],
        width=width,
        layers=len(visual.head.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        stem=0,
        projected=visual.output_tokens,
        embedding=spec.architecture["embed_dim"],
        counted=below + above,
        backbone=below,
        kept=kept // count,
    )
    if lock is not True:
        backward = 2 * (sum(trained) // count if lock else below) + 2 * above
    elif spec.mixture_tokens == 1:
        backward = 0
    else:  # gradients of the blocks' inputs, and of both inputs of attention, lead to the latents
        backward = above - 2 * features[0].numel() * width + tower.layers * tower.attention
    return dataclasses.replace(tower, counted_backward=backward)


def _count_trained(trunk: torch.nn.Module, counter: FlopCounterMode) -> list[int]:
    """Return a list that will hold the FLOPs, forward, of each module of `trunk` with weights of its own to train."""
    counts: list[int] = []

    def start(*_: Any) -> None:
        counts.append(-counter.get_total_flops())

    def end(*_: Any) -> None:
        counts[-1] += counter.get_total_flops()

    for module in trunk.modules():
        if not list(module.children()) and any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(start)
            module.register_forward_hook(end)
    return counts


def hf_text_tower(spec: ModelSpec) -> Tower:
    """Return the text tower of a model whose encoder comes from Hugging Face."""
    return _hf_text_tower(json.dumps(spec.to_dict()))


@functools.cache
def _hf_text_tower(described: str) -> Tower:
    spec = ModelSpec(**json.loads(described))
    text: Any = meta_model(spec).text.eval()
    tokens = torch.ones(1, spec.context_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as flops:
        text(tokens)
    config = text.transformer.config
    return Tower(
        tokens=spec.context_length,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=next((size for name in _HIDDEN if (size := getattr(config, name, None))), 4 * config.hidden_size),
        stem=0,
        projected=1,
        embedding=spec.architecture["embed_dim"],
        counted=flops.get_total_flops(),
    )


@functools.cache  # seconds, and asked for several times
def _timm_image_tower(described: str) -> Tower:
    spec = ModelSpec(**json.loads(described))
    visual: Any = meta_model(spec).visual  # one of timm's
    images = torch.empty(1, 3, spec.image_size, spec.image_size, device="meta")
    with FlopCounterMode(display=False) as flops:
        visual.train()(images)
    with FlopCounterMode(display=False) as stem:
        visual.trunk.patch_embed(images)
    trunk, block = visual.trunk, visual.trunk.blocks[0]
    dropped = spec.architecture["vision_cfg"].get("patch_dropout", 0.0)
    patches = kept_patches(visual.grid_size[0] * visual.grid_size[1], dropped)
    hidden = max(m.out_features for m in block.mlp.modules() if isinstance(m, torch.nn.Linear))
    return Tower(
        tokens=trunk.num_prefix_tokens + patches,
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=block.attn.num_heads,
        hidden=hidden,
        stem=stem.get_total_flops(),
        projected=spec.mixture_tokens + (patches if visual.gives_patches else 0),
        embedding=spec.architecture["embed_dim"],
        counted=flops.get_total_flops(),
    )
