"""One set of names for the weights of every layout: wrappers' prefixes, plain and custom CLIP, single towers."""

import re
from collections.abc import Mapping

from torch import Tensor

TOWERS = ("visual.", "text.")

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DDP and torch.compile, at any depth
_TEXT_TOWER = re.compile(
    r"^(transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection|cls_emb$)"
)
_NOT_WEIGHTS = re.compile(
    r"^(input_resolution|context_length|vocab_size)$"  # numbers that OpenAI's archives keep among the tensors
    r"|(^|\.)(attn_mask|position_ids)$"  # buffers that older releases of the libraries stored
)
_IMAGE_TOWERS = {"conv1.weight": "visual.", "trunk.patch_embed.proj.weight": "visual."}
_TIMM_TRUNK = "patch_embed.proj.weight"


def _alone(state: Mapping[str, Tensor]) -> str:
    """Return the prefix that is missing where a file holds one image tower by itself."""
    for key, prefix in _IMAGE_TOWERS.items():
        if key in state:
            return prefix
    return "visual.trunk." if _TIMM_TRUNK in state else ""


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefixes of DDP and torch.compile, and without what is not a weight."""
    state = {_WRAPPERS.sub("", key): value for key, value in state_dict.items()}
    return {key: value for key, value in state.items() if not _NOT_WEIGHTS.search(key)}


def canonical_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under `visual.` and `text.`, whatever wrote the file.

    Strips the prefixes of DDP and torch.compile, moves a plain CLIP's text tower below `text.`, puts an image tower
    that was saved by itself (OpenCLIP's or timm's) below `visual.`, and drops what is not a weight.
    """
    state = without_wrappers(state_dict)
    prefix = _alone(state)
    if prefix:
        return {prefix + key: value for key, value in state.items()}
    if any(key.startswith("text.") for key in state):
        return state
    return {("text." + key if _TEXT_TOWER.match(key) else key): value for key, value in state.items()}


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries below `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
