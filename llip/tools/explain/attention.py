"""Where mixture tokens look: their attention over the patches of the image tower.

Shapes: B images, K mixture tokens, L = H x W patches, N tokens of the tower (any prefix and the patches), A heads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llip.errors import UserError
from llip.open_clip.plain import PlainImageTower
from llip.open_clip.towers.backbone import BackboneTower
from llip.open_clip.towers.base import MixtureTower

How = Literal["last", "rollout"]

_UNKNOWN = (
    "the image tower does not compute the attention of its outputs over patches by torch's own functions, so its "
    "weights are unknown; draw no maps, with --attention none"
)


class _Attentions(TorchFunctionMode):
    """Records the weights [B, A, queries, keys] of every attention that is computed in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(_weights(*arguments[:2], *arguments[3:4], **options))
        elif function is F.multi_head_attention_forward:  # called by torch's module; it can return them
            asked = {"need_weights": True, "average_attn_weights": False}
            weights = function(*arguments, **(options | asked))[1]
            assert weights is not None
            self.weights.append(weights.float())
        return function(*arguments, **options)


def _weights(query: Tensor, key: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_) -> Tensor:
    logits = query.float() @ key.float().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    return (logits if attn_mask is None else logits + attn_mask.float()).softmax(dim=-1)


def tower_attention(visual: MixtureTower, images: Tensor) -> list[Tensor]:
    """Return the attention weights of the tower from first to last: [B, A, N, N] of each block.

    Row i holds the weights of token i over all tokens, mixture tokens before patches; it sums to one. A tower that
    pools by attention has one more item [B, A, K, N], the weights of its K latents. Of a backbone with a mixture head,
    the blocks are the head's.

    Raises:
        UserError: a tower that computes attention in another way.
    """
    assert not visual.training, "patches may be dropped in training mode"
    attentions, fast = _Attentions(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes a layer in one kernel
    try:
        with torch.no_grad():
            inputs = visual.frozen_features(images) if isinstance(visual, BackboneTower) else images
            with attentions:
                visual(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    height, width = patch_grid(visual)
    if not attentions.weights or any(weights.shape[-1] < height * width for weights in attentions.weights):
        raise UserError(_UNKNOWN)
    return attentions.weights


def patch_grid(visual: MixtureTower) -> tuple[int, int]:
    """Return H and W of the tower's patches.

    Raises:
        UserError: a plain OpenCLIP tower whose output is not its class token.
    """
    if isinstance(visual, PlainImageTower):
        tower = visual.source.visual
        if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None or tower.pool_type != "tok":
            raise UserError(_UNKNOWN)
        return tower.grid_size
    return visual.grid_size


def rollout(blocks: list[Tensor]) -> Tensor:
    """Return [B, N, N]: how much each output token draws from each input patch or token, through all blocks.

    Attention rollout (Abnar & Zuidema 2020): the head average of each block, half of it the residual path, multiplied
    up. It ignores values and MLPs: a picture of the flow, not a proof.

    Args:
        blocks: attention weights [B, A, N, N], first block first.
    """
    same = torch.eye(blocks[0].shape[-1], dtype=blocks[0].dtype, device=blocks[0].device)
    flow = same
    for weights in blocks:
        flow = (0.5 * weights.mean(dim=1) + 0.5 * same) @ flow
    return flow


@torch.no_grad()
def token_attention(visual: MixtureTower, images: Tensor, how: How = "last") -> Tensor:
    """Return where each mixture token looks [B, K, H, W], row by row from the top left.

    A map sums to less than one: the rest is attention to tokens that are not patches.

    Args:
        visual: the image tower, in eval mode.
        images: normalised [B, 3, S, S].
        how: last: the last attention, averaged over its heads; rollout: through all blocks.

    Raises:
        UserError: a tower whose attention is not known.
    """
    *blocks, last = tower_attention(visual, images)
    height, width = patch_grid(visual)
    pooled = last.shape[2] != last.shape[3] and last.shape[2] == visual.mixture_tokens
    if how == "last":
        weights = last.mean(dim=1)
    elif pooled:  # latents have no residual path, and may not attend to the prefix
        flow = rollout(blocks)
        weights = last.mean(dim=1) @ flow[:, flow.shape[1] - last.shape[3] :]
    else:
        weights = rollout([*blocks, last])
    return weights[:, : visual.mixture_tokens, weights.shape[2] - height * width :].unflatten(2, (height, width))
