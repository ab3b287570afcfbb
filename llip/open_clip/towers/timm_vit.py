"""timm's vision transformers with K mixture tokens: by class token, and by attention pool (SigLIP, SigLIP 2).

The trunk is timm's plain vision transformer or its EVA (rotary positions: EVA-02, Perception Encoder). Both towers keep
the modules and names of OpenCLIP's timm tower (`trunk.*`, `head.*`): its weights differ in the token rows alone.

Shapes: B images, L patches, K mixture tokens, R registers, W width of the trunk, D width of the embedding.
"""

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import AttentionPoolLatent
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llip.errors import UserError
from llip.open_clip.towers.base import MixtureTower, copies_offset
from llip.open_clip.towers.seeding import SEED_SPREAD, copy_rows, fit_positions


def timm_refusal(tower: TimmModel) -> str | None:
    """Return why this tower cannot have mixture tokens, None where it can."""
    trunk = tower.trunk
    if not isinstance(trunk, VisionTransformer | Eva):
        return f"its image tower is timm's {type(trunk).__name__}, neither a plain vision transformer nor an EVA"
    if getattr(trunk, "rope_mixed", False):
        return "its image tower has rotary positions of another kind in each block"
    if trunk.global_pool == "token" and trunk.cls_token is not None:
        return None
    if trunk.global_pool == "map" and type(trunk.attn_pool) is AttentionPoolLatent and trunk.attn_pool.latent_len == 1:
        return None
    return f"its image tower pools by {trunk.global_pool!r}, neither by a class token nor by an attention pool"


class _TimmTower(MixtureTower):
    """What the two towers share: the trunk up to the pool, and what follows it."""

    trunk: Any  # timm's VisionTransformer or Eva

    def __init__(self, source: TimmModel, mixture_tokens: int) -> None:
        super().__init__()
        assert mixture_tokens >= 1, f"mixture_tokens = {mixture_tokens}"
        self.mixture_tokens = mixture_tokens
        self.trunk, self.head = source.trunk, source.head
        self.image_size: tuple[int, int] = tuple(self.trunk.patch_embed.img_size)
        self.grid_size: tuple[int, int] = tuple(self.trunk.patch_embed.grid_size)
        self.is_eva = isinstance(self.trunk, Eva)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.grad_checkpointing = enable

    def default_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation [3] that timm names for the trunk's own weights."""
        described = self.trunk.pretrained_cfg
        return tuple(described["mean"]), tuple(described["std"])

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the blocks' input [B, tokens + L, W], any class and register tokens first, then (kept) patches; and
        what the blocks take beside it: EVA's rotary positions.
        """
        trunk = self.trunk
        placed = trunk._pos_embed(trunk.patch_embed(self.source_pixels(images)))
        if self.is_eva:  # has dropped its patches there, with their positions
            tokens, positions = placed
            return trunk.norm_pre(tokens), {"rope": positions}
        return trunk.norm_pre(trunk.patch_drop(placed)), {}

    def features(self, images: Tensor) -> Tensor:
        """Return the normalised outputs of the last block, of all tokens."""
        tokens, beside = self.embed(images)
        mask = self.attention_mask(tokens)
        for block in self.trunk.blocks:
            if self.trunk.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False, attn_mask=mask, **beside)  # type: ignore[call-overload] # forwards keywords
            else:
                tokens = block(tokens, attn_mask=mask, **beside)
        return self.trunk.norm(tokens)

    def project(self, pooled: Tensor) -> Tensor:
        """Map pooled tokens [B, K, W] to the embedding [B, K, D]."""
        trunk = self.trunk
        return self.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled))))


class TimmTokenViT(_TimmTower):
    """Pooled by a class token: the class token, then the registers, then copies of the class token are the K tokens.

    Copies of the class token count as one under the softmax (`towers.base`); registers are no copies and count fully.
    Without registers step 0 equals the source. With R of them it does for pooling=first alone: the registers' outputs,
    which the source threw away, are mixture tokens here.
    """

    def __init__(self, source: TimmModel, mixture_tokens: int) -> None:
        """Build around `source`, whose modules are used, not copied.

        Raises:
            UserError: fewer mixture tokens than the source has prefix tokens.
        """
        super().__init__(source, mixture_tokens)
        trunk = self.trunk
        self.source_tokens: int = trunk.num_prefix_tokens
        if mixture_tokens < self.source_tokens:
            raise UserError(
                f"mixture_tokens = {mixture_tokens}: the image tower has {self.source_tokens} prefix tokens (class "
                "token and registers), which all become mixture tokens; give at least as many"
            )
        state = {"trunk.cls_token": trunk.cls_token.detach()}
        if trunk.reg_token is not None:
            state["trunk.reg_token"] = trunk.reg_token.detach()
        if trunk.pos_embed is not None:
            state["trunk.pos_embed"] = trunk.pos_embed.detach()
        self.fit_source(state, SEED_SPREAD)
        trunk.cls_token, trunk.reg_token = nn.Parameter(self._fresh(state["trunk.cls_token"])), None
        if trunk.pos_embed is not None:
            trunk.pos_embed = nn.Parameter(state["trunk.pos_embed"])
        trunk.num_prefix_tokens, trunk.num_reg_tokens = mixture_tokens, 0
        # All that count the tokens in front of the patches: patch dropout, and EVA's attention (they have no position).
        for counter in (trunk.patch_drop, *(block.attn for block in trunk.blocks)):
            if hasattr(counter, "num_prefix_tokens"):
                counter.num_prefix_tokens = mixture_tokens

    def _fresh(self, rows: Tensor) -> Tensor:
        """Return start values [1, K, W] for training from scratch: rows that differ, as OpenCLIP draws its own."""
        extra = rows.shape[1] - self.source_tokens
        drawn = rows.shape[2] ** -0.5 * torch.randn(1, extra, rows.shape[2])
        return torch.cat([rows[:, : self.source_tokens], drawn], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to mixture tokens [B, K, D] (not normalised), and patches if they are asked for."""
        features = self.features(images)
        return self.project(features if self.gives_patches else features[:, : self.mixture_tokens])

    def fit_source(self, state: dict[str, Tensor], spread: float) -> list[str]:
        """See `MixtureTower`. A file may hold class token and registers, or K mixture tokens."""
        if "trunk.cls_token" not in state:
            return []
        notes: list[str] = []
        rows = state["trunk.cls_token"][0]  # [1 or K, W]
        registers = state.pop("trunk.reg_token", None)
        if registers is not None:
            rows = torch.cat([rows, registers[0]])
        given = len(rows)
        if given < self.mixture_tokens and given in (1, self.source_tokens):
            rows, copies = copy_rows(rows, self.mixture_tokens, spread)
            state["key_offset"] = copies_offset(copies)
            notes.append(
                f"{self.mixture_tokens} mixture tokens: {given} of the source's own, then copies of its class token, "
                "counting as one"
            )
        state["trunk.cls_token"] = rows[None]
        if "trunk.pos_embed" in state:
            own, tokens = (0, 0) if self.trunk.no_embed_class else (given, self.mixture_tokens)
            positions, note = fit_positions(state["trunk.pos_embed"][0], (own,), tokens, self.grid_size)
            state["trunk.pos_embed"] = positions[None]
            notes += [] if note is None else [note]
        return notes


class TimmLatentViT(_TimmTower):
    """Pooled by attention (SigLIP, SigLIP 2): the K mixture tokens are K latents of the pool instead of one.

    Each latent asks the patches by itself and no latent sees another, so K equal ones give K times the source's
    feature: step 0 equals the source by construction, and nothing has to count as one.
    """

    def __init__(self, source: TimmModel, mixture_tokens: int) -> None:
        """Build around `source`, whose modules are used, not copied; further latents are drawn as timm draws one."""
        super().__init__(source, mixture_tokens)
        pool = self.trunk.attn_pool
        extra = torch.empty(1, mixture_tokens - 1, pool.latent_dim)
        nn.init.trunc_normal_(extra, std=pool.latent_dim**-0.5)
        pool.latent = nn.Parameter(torch.cat([pool.latent.detach(), extra], dim=1))
        pool.latent_len, pool.pool = mixture_tokens, ""

    def give_patches(self) -> None:
        raise UserError(
            "the image tower pools by attention: its patch outputs are not in the space of its features; set "
            "pair_tokens=mixture, or choose a model that pools by a class token"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to mixture tokens [B, K, D] (not normalised)."""
        features = self.features(images)
        if not (self.is_eva or self.trunk.pool_include_prefix):  # EVA's pool sees its class token
            features = features[:, self.trunk.num_prefix_tokens :]
        return self.project(self.trunk.attn_pool(features))

    def fit_source(self, state: dict[str, Tensor], spread: float) -> list[str]:
        """See `MixtureTower`. A file may hold one latent or K."""
        notes: list[str] = []
        if "trunk.attn_pool.latent" in state:
            rows = state["trunk.attn_pool.latent"][0]
            if len(rows) == 1 and self.mixture_tokens > 1:
                rows, _ = copy_rows(rows, self.mixture_tokens, spread)
                notes.append(f"{self.mixture_tokens} latents of the attention pool copied from one")
            state["trunk.attn_pool.latent"] = rows[None]
        if "trunk.pos_embed" in state:
            own = 0 if self.trunk.no_embed_class else self.trunk.num_prefix_tokens
            positions, note = fit_positions(state["trunk.pos_embed"][0], (own,), own, self.grid_size)
            state["trunk.pos_embed"] = positions[None]
            notes += [] if note is None else [note]
        return notes


def timm_tower(source: TimmModel, mixture_tokens: int) -> MixtureTower:
    """Return the tower with K mixture tokens around OpenCLIP's timm tower.

    Raises:
        UserError: a trunk that mixture tokens cannot go into.
    """
    reason = timm_refusal(source)
    if reason is not None:
        raise UserError(f"the model cannot carry mixture tokens: {reason}")
    kind = TimmLatentViT if source.trunk.global_pool == "map" else TimmTokenViT
    return kind(source, mixture_tokens)
