"""OpenCLIP's class-token ViT with K mixture tokens instead of the one class token.

Shapes: B images, L patches, K mixture tokens, W width of the tower, D width of the embedding.
"""

import torch
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn

from llip.open_clip.towers.base import MixtureTower, copies_offset
from llip.open_clip.towers.seeding import copy_rows, fit_positions


class MixtureTokenViT(MixtureTower):
    """The image tower: an OpenCLIP `VisionTransformer` that takes K learnable tokens in and gives K features out.

    It adopts the modules of an OpenCLIP tower under their own names, so that state dicts differ only in the K rows of
    `class_embedding` and of `positional_embedding`: 2 (K - 1) W parameters more (METHOD: Llip paper, section 3).
    """

    def __init__(self, source: VisionTransformer, mixture_tokens: int) -> None:
        """Build around `source`, whose class token must be its pooled output.

        Args:
            source: OpenCLIP's tower; its modules are used, not copied.
            mixture_tokens: K, at least 1. Row 0 is the source's class token with its position; with K > 1 the other
                rows are drawn from the distribution that OpenCLIP draws both embeddings from.
        """
        super().__init__()
        assert mixture_tokens >= 1, f"mixture_tokens = {mixture_tokens}"
        pools_by_class_token = source.pool_type == "tok" and source.attn_pool is None
        assert pools_by_class_token, "the source must pool by its class token"
        self.mixture_tokens = mixture_tokens
        self.image_size: tuple[int, int] = source.image_size
        self.patch_size: tuple[int, int] = source.patch_size
        self.grid_size: tuple[int, int] = source.grid_size
        self.output_dim: int = source.output_dim
        width = source.conv1.out_channels

        self.conv1 = source.conv1
        extra = width**-0.5 * torch.randn(2, mixture_tokens - 1, width)
        class_token, position = source.class_embedding.detach(), source.positional_embedding.detach()
        self.class_embedding = nn.Parameter(torch.cat([class_token[None], extra[0]]))  # [K, W]
        self.positional_embedding = nn.Parameter(  # [K + L, W]
            torch.cat([position[:1], extra[1], position[1:]]), requires_grad=source.positional_embedding.requires_grad
        )
        dropped = source.patch_dropout.prob if isinstance(source.patch_dropout, PatchDropout) else 0.0
        self.patch_dropout = PatchDropout(dropped, exclude_first_token=False) if dropped > 0 else nn.Identity()
        self.ln_pre = source.ln_pre
        self.transformer = source.transformer
        self.ln_post = source.ln_post
        self.proj = source.proj

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def embed(self, images: Tensor) -> Tensor:
        """Return the transformer's input [B, K + L, W]: mixture tokens first, then (kept) patches."""
        tokens = self.mixture_tokens
        patches = self.conv1(self.source_pixels(images)).flatten(2).transpose(1, 2)  # [B, L, W]
        position = self.positional_embedding.to(patches.dtype)
        patches = self.patch_dropout(patches + position[tokens:])
        mixture = self.class_embedding.to(patches.dtype) + position[:tokens]  # [K, W]
        return self.ln_pre(torch.cat([mixture.expand(images.shape[0], -1, -1), patches], dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to mixture tokens [B, K, D] (not normalised), and patches if they are asked for."""
        tokens = self.embed(images)
        outputs = self.transformer(tokens, attn_mask=self.attention_mask(tokens))  # [B, K + L, W]
        return self.ln_post(outputs if self.gives_patches else outputs[:, : self.mixture_tokens]) @ self.proj

    def fit_source(self, state: dict[str, Tensor], spread: float) -> list[str]:
        """See `MixtureTower`. A file may hold one token or K, and one position row for them or K."""
        if not {"class_embedding", "positional_embedding"} <= state.keys():
            return []
        notes = []
        rows = state["class_embedding"].reshape(-1, state["class_embedding"].shape[-1])  # [1 or K, W]
        given = len(rows)
        if given == 1 and self.mixture_tokens > 1:
            rows, copies = copy_rows(rows, self.mixture_tokens, spread)
            state["key_offset"] = copies_offset(copies)
            notes.append(f"{self.mixture_tokens} mixture tokens copied from one class token, counting as one")
        state["class_embedding"] = rows
        state["positional_embedding"], note = fit_positions(
            state["positional_embedding"], tuple({given: 0, 1: 0}), self.mixture_tokens, self.grid_size
        )
        return notes if note is None else [*notes, note]
