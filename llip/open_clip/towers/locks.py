"""Which parameters of the towers are trained: `lock_image`, `lock_text`, and the order of a tower's blocks."""

import re
from typing import Any, Literal

from timm.models import group_parameters

from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.open_clip.towers.backbone import BackboneTower

LockImage = bool | int | Literal["backbone"]
LockText = bool | Literal["encoder"]

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


def lock_towers(model: Llip, lock_image: LockImage, lock_text: LockText) -> None:
    """Freeze parts of the towers, as the config fields of these names say.

    Raises:
        UserError: the model does not have such a part, or nothing is left to train.
    """
    above, several = blocks_above(model), model.visual.mixture_tokens > 1
    _check_lock(model, above, lock_image)
    for name, parameter in model.named_parameters():
        if name.startswith("visual."):
            locked = _locks_image(name, above[name], lock_image, several)
        else:
            is_kept = lock_text == "encoder" and name.startswith(_TEXT_PROJECTION)
            locked = bool(lock_text) and name.startswith("text.") and not is_kept
        if locked:
            parameter.requires_grad_(False)
    model.train(model.training)  # locked parts are in eval mode
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lock_image and lock_text leave nothing to train")


def _locks_image(name: str, above: int, lock: LockImage, several: bool) -> bool:
    """Return whether a parameter of the image tower is locked; its tokens never are, where it has several."""
    if lock == "backbone":
        return name.startswith(_BACKBONE)
    if several and name in _TOKENS:
        return False
    return lock if isinstance(lock, bool) else above >= int(lock)


def _check_lock(model: Llip, above: dict[str, int], lock: LockImage) -> None:
    if lock == "backbone" and not isinstance(model.visual, BackboneTower):
        raise UserError("lock_image=backbone: the model has no mixture_head; set lock_image=true, or N blocks to train")
    blocks = max(count for name, count in above.items() if name.startswith("visual."))
    if isinstance(lock, int) and lock > blocks:
        raise UserError(f"lock_image = {lock}: the image tower has {blocks} blocks; set fewer, or lock_image=false")


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
