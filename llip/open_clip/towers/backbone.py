"""Any timm backbone with a head of K latents over its features: the model json's `mixture_head`.

The backbone gives its unpooled features, as timm does with `num_classes=0, global_pool=''`: a map or a sequence. With x
those of one image [L, W] and Z the K latents [K, C], the head is

    u = dropout(LayerNorm(x)) W_in + b_in + P           positions P [L, C]
    [y; v] = LayerNorm(blocks([Z; u]))                  timm's transformer blocks, pre-norm, full attention
    h = y W_out                                         the mixture tokens [K, D]; v W_out are the patches

The LayerNorm in front makes the head independent of the scale of a backbone's features, which differs by orders of
magnitude between families.

Shapes: B images, P prefix tokens of a ViT, L = P + patches, W width of the backbone, C width of the head, K mixture
tokens, D embedding width.
"""

import copy
import dataclasses
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llip.errors import UserError, did_you_mean
from llip.open_clip.towers.base import MixtureTower
from llip.open_clip.towers.seeding import copy_rows
from llip.open_clip.weights.key_names import part

_CHANNELS_LAST = "NHWC"  # timm's `output_fmt` of maps such as Swin's; others are NCHW


@dataclasses.dataclass(frozen=True)
class MixtureHeadConfig:
    """The json's `mixture_head`.

    Attributes:
        blocks: transformer blocks; 0: each latent is a constant, so at least 1 for K mixture tokens of the image.
        width: C. heads: of the attention; divides the width.
        tokens: `map`, the last feature map (of a ViT, its patches); `sequence`, a ViT's prefix tokens too (class token
            and registers). None: the sequence where the backbone has prefix tokens, otherwise the map.
        grid: side that the map is pooled to before the head (adaptive average); None: as it is.
        dropout: of the head's inputs and of the outputs of attention and MLP.
        mlp_ratio: hidden width of a block's MLP, over C.
    """

    blocks: int = 2
    width: int = 384
    heads: int = 6
    tokens: str | None = None
    grid: int | None = None
    dropout: float = 0.0
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("blocks", "width", "heads", "grid"):
            value = getattr(self, name)
            if not (name == "grid" and value is None) and (type(value) is not int or value < 1):
                raise UserError(f"mixture_head.{name} = {value!r}: expected an integer of at least 1")
        if self.width % self.heads:
            raise UserError(f"mixture_head.heads = {self.heads} does not divide mixture_head.width = {self.width}")
        if self.tokens not in (None, "map", "sequence"):
            raise UserError(f"mixture_head.tokens = {self.tokens!r}: expected 'map' or 'sequence'")
        for name, high in (("dropout", 1), ("mlp_ratio", 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < high:
                raise UserError(
                    f"mixture_head.{name} = {value!r}: expected a number from 0 to {high} ({high} excluded)"
                )

    @classmethod
    def from_json(cls, described: Any) -> "MixtureHeadConfig":
        """Read and check the json's object.

        Raises:
            UserError: an unknown key, with the nearest one, or a value out of its bounds.
        """
        if not isinstance(described, dict):
            raise UserError(f"mixture_head: expected an object, found {type(described).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        for key in described:
            if key not in names:
                raise UserError(f"unknown key {f'mixture_head.{key}'!r}.{did_you_mean(key, names)}")
        return cls(**described)


class MixtureHead(nn.Module):
    """Features [B, L, W] to mixture tokens [B, K, D], and to the patches that follow them."""

    def __init__(self, config: MixtureHeadConfig, mixture_tokens: int, tokens: int, width: int, embed_dim: int) -> None:
        """Draw fresh weights.

        Args:
            config: blocks and widths.
            mixture_tokens: K.
            tokens: L.
            width: W.
            embed_dim: D.
        """
        super().__init__()
        size = config.width
        self.norm_in = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.proj_in = nn.Linear(width, size)
        self.latents = nn.Parameter(size**-0.5 * torch.randn(mixture_tokens, size))
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, size))
        self.blocks = nn.Sequential(
            *(
                Block(size, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, proj_drop=config.dropout)
                for _ in range(config.blocks)
            )
        )
        self.norm = nn.LayerNorm(size)
        self.proj = nn.Linear(size, embed_dim, bias=False)
        self.grad_checkpointing = False

    def forward(self, features: Tensor, patches: int) -> Tensor:
        """Map features [B, L, W] to mixture tokens [B, K, D], followed by the outputs of the last `patches` of them."""
        inputs = self.proj_in(self.dropout(self.norm_in(features))) + self.positions
        tokens = torch.cat([self.latents.to(inputs.dtype).expand(inputs.shape[0], -1, -1), inputs], dim=1)
        for block in self.blocks:
            recompute = self.grad_checkpointing and self.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        outputs = tokens[:, : len(self.latents)]
        if patches:
            outputs = torch.cat([outputs, tokens[:, -patches:]], dim=1)
        return self.proj(self.norm(outputs))


class BackboneTower(MixtureTower):
    """A timm backbone (`trunk`) and the head over its features."""

    trunk: Any  # of timm

    def __init__(
        self, trunk: Any, config: MixtureHeadConfig, mixture_tokens: int, image_size: int, embed_dim: int
    ) -> None:
        """Put the head on `trunk`.

        Args:
            trunk: from timm, with unpooled outputs (`num_classes=0, global_pool=''`).
            config: of the head.
            mixture_tokens: K.
            image_size: pixels per side.
            embed_dim: D.

        Raises:
            UserError: an image size that the backbone cannot take, or features that the head cannot.
        """
        super().__init__()
        self.mixture_tokens, self.image_size, self.grid = mixture_tokens, (image_size, image_size), config.grid
        name = trunk.pretrained_cfg["architecture"]
        set_input_size(trunk, name, image_size)
        self.trunk = trunk
        self.prefix = int(getattr(trunk, "num_prefix_tokens", 0))
        self.keeps_prefix = config.tokens != "map" and self.prefix > 0
        if config.tokens == "sequence" and not self.prefix:
            raise UserError(f"mixture_head.tokens = 'sequence': {name} has no class token; set 'map', or leave it out")
        prefix, patches = self._probe(name)
        side = patches.shape[-1]
        if config.grid is not None and config.grid > side:
            raise UserError(
                f"mixture_head.grid = {config.grid}: {name} gives {patches.shape[-2]} x {side} features of an image "
                f"of {image_size} pixels; set at most that"
            )
        self.grid_size = (patches.shape[-2], side) if config.grid is None else (config.grid, config.grid)
        tokens = self.grid_size[0] * self.grid_size[1] + prefix.shape[1]
        self.head = MixtureHead(config, mixture_tokens, tokens, patches.shape[1], embed_dim)
        self.set_pixel_statistics(*self.default_statistics())

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to mixture tokens [B, K, D] (not normalised), and patches if they are asked for.

        Features [B, L, W] from `frozen_features` are taken instead of images.
        """
        features = images if images.ndim == 3 else self.frozen_features(images)
        return self.head(features, self.output_tokens - self.mixture_tokens)

    def frozen_features(self, images: Tensor) -> Tensor:
        """See `MixtureTower`: the backbone's features [B, L, W], any prefix tokens first, pooled to the grid."""
        prefix, patches = self._split(self.trunk(self.source_pixels(images)))
        if self.grid is not None:
            patches = F.adaptive_avg_pool2d(patches, self.grid)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)

    def from_features(self, features: Tensor) -> Tensor:
        """See `MixtureTower`. Through `forward`, where FSDP and torch.compile have their hooks."""
        return self(features)

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backbone's outputs as prefix tokens [B, P or 0, W] and patches [B, W, H, W]."""
        if outputs.ndim == 4:
            patches = outputs.permute(0, 3, 1, 2) if self.trunk_is_channels_last else outputs
            return outputs.new_empty(outputs.shape[0], 0, patches.shape[1]), patches
        prefix, rows = outputs[:, : self.prefix], outputs[:, self.prefix :]
        side = round(rows.shape[1] ** 0.5)
        patches = rows.transpose(1, 2).unflatten(2, (side, -1))
        return prefix if self.keeps_prefix else prefix[:, :0], patches

    @property
    def trunk_is_channels_last(self) -> bool:
        return getattr(self.trunk, "output_fmt", None) == _CHANNELS_LAST

    def _probe(self, name: str) -> tuple[Tensor, Tensor]:
        """Run a copy of the backbone without memory, and return its features as `_split` does.

        Raises:
            UserError: the backbone does not take images of this size, or gives no features of one width.
        """
        tensors = [*self.trunk.parameters(), *self.trunk.buffers()]
        memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
        trunk = copy.deepcopy(self.trunk, memo).eval()
        images = torch.empty(1, 3, *self.image_size, device="meta")
        try:
            with torch.no_grad():
                return self._split(trunk(images))
        except Exception as error:  # whatever the family raises
            default = trunk.pretrained_cfg["input_size"]
            raise UserError(
                f"image_size {self.image_size[0]}: timm's {name} gives no features of such images (it was made for "
                f"{default[1]} x {default[2]} pixels); {type(error).__name__}: {error}"
            ) from error

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.head.grad_checkpointing = enable
        self.trunk.set_grad_checkpointing(enable)

    def default_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation [3] that timm names for the backbone's weights."""
        described = self.trunk.pretrained_cfg
        return tuple(described["mean"]), tuple(described["std"])

    def fit_source(self, state: dict[str, Tensor], spread: float) -> list[str]:
        """See `MixtureTower`. A file may hold one latent or K, or another head, which is left behind."""
        notes = []
        if "head.latents" in state:
            rows = state["head.latents"]
            if len(rows) == 1 < self.mixture_tokens:
                state["head.latents"], _ = copy_rows(rows, self.mixture_tokens, spread)
                notes.append(f"{self.mixture_tokens} latents of the mixture head copied from one")
        elif trunk := part(state, "trunk."):
            _, notes = fit_trunk(self.trunk, trunk)
            state.clear()
            state.update({f"trunk.{key}": value for key, value in trunk.items()})
            if self.pixel_scale is not None and self.pixel_shift is not None:  # foreign weights have none: timm's
                state |= {"pixel_scale": self.pixel_scale, "pixel_shift": self.pixel_shift}
            notes.append("the mixture head starts from fresh weights")
        return notes


def fit_trunk(trunk: Any, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Turn a timm model's weights into those of `trunk`, in place, as timm does.

    timm's own function for the family translates the names of other releases and resizes position embeddings.

    Returns:
        (names left out, of the model's own pooling and classifier; what else was done, one sentence each).
    """
    name = trunk.pretrained_cfg["architecture"]
    translate = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if translate and state:
        translated = dict(translate(dict(state), trunk))
        state.clear()
        state.update(translated)
    notes = []
    if "norm.weight" not in state and "fc_norm.weight" in state and hasattr(trunk, "norm"):
        for key in ("weight", "bias"):
            state[f"norm.{key}"] = state.pop(f"fc_norm.{key}")
        notes.append("the norm behind the source's pooling is applied to each token")
    with torch.device("meta"):
        beyond = timm.create_model(name).state_dict().keys() - trunk.state_dict().keys()
    left = [key for key in state if key in beyond]
    for key in left:
        del state[key]
    return left, notes


def set_input_size(trunk: Any, name: str, image_size: int) -> None:
    """Set the image size of a timm model that is built for one.

    Raises:
        UserError: the model cannot take it.
    """
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch and image_size % patch[0]:
        raise UserError(f"image_size {image_size}: timm's {name} has patches of {patch[0]} pixels; set a multiple")
    if not hasattr(trunk, "set_input_size"):
        return
    try:
        trunk.set_input_size(img_size=image_size)
    except Exception as error:  # whatever the family raises
        raise UserError(f"image_size {image_size}: timm's {name} cannot take it ({error})") from error
