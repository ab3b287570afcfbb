"""The shape of one transformer, and that of a tower from timm, which is read off the tower itself.

Shapes: N tokens of a tower, W its width, D embedding width, K mixture tokens, L patches.
"""

import dataclasses
import functools
import json
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llip.open_clip.architecture import build_towers
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.model import Llip


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

    @property
    def block(self) -> int:
        """FLOPs of one block, forward."""
        tokens, width = self.tokens, self.width
        linear = 2 * tokens * width * (4 * width + 2 * self.hidden)
        return linear + 4 * tokens**2 * width

    @property
    def forward(self) -> int:
        """FLOPs of one sample, forward."""
        return self.counted or self.stem + self.layers * self.block + 2 * self.projected * self.width * self.embedding

    @property
    def backward(self) -> int:
        """FLOPs of one sample, backward: two products for each, one for the stem."""
        return 2 * self.forward - self.stem


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
    if not vision.get("timm_model_name") or vision.get("timm_pool") == "map":
        return 1
    with torch.device("meta"):
        return build_towers(spec.architecture).visual.trunk.num_prefix_tokens


def timm_image_tower(spec: ModelSpec) -> Tower:
    """Return the image tower of a model whose tower comes from timm."""
    return _timm_image_tower(json.dumps(spec.to_dict()))


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
