"""Weights into a model: reading checkpoint files safely, canonical names, and K tokens from one.

Shapes: K mixture tokens, L patches, W width of the image tower.
"""

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from llip.errors import UserError, nearest

log = logging.getLogger(__name__)

SEED_SPREAD = 0.01
"""Mixture tokens seeded from one class token differ by this share of its root mean square."""

_TEXT_TOWER = re.compile(r"^(transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection)")


def find_weights(pretrained: str, model_name: str) -> Path:
    """Return the file that `pretrained` names: a path, or an OpenCLIP tag for `model_name` (downloaded if it can be).

    Raises:
        UserError: neither a file nor a tag, or the download failed.
    """
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if pretrained not in tags:
        known = f"OpenCLIP's tags for {model_name}: {', '.join(tags)}" if tags else f"{model_name} has no OpenCLIP tags"
        raise UserError(f"pretrained = {pretrained!r} is neither a file nor a tag; {known}")
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model_name, pretrained)))
    except Exception as error:  # any network or hub failure: the user needs the fix, not the stack
        raise UserError(
            f"the weights of tag {pretrained!r} could not be downloaded ({type(error).__name__}: {error}); "
            "fetch the file elsewhere and give its path"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of plain tensors and containers (`weights_only`: nothing in it is ever executed).

    Raises:
        UserError: the file is not there, is damaged, or holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"state_dict": load_file(path)}
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"checkpoint {str(path)!r} is refused: not only tensors and containers ({reason})") from error
    except Exception as error:
        raise UserError(f"checkpoint {str(path)!r} is damaged or no checkpoint: {error}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {str(path)!r} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


def canonical_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefixes of DDP and torch.compile, and move a plain CLIP's text tower below `text.`."""
    names = {key: re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", key) for key in state_dict}
    renamed = {names[key]: value for key, value in state_dict.items()}
    if any(key.startswith("text.") for key in renamed):
        return renamed
    return {("text." + key if _TEXT_TOWER.match(key) else key): value for key, value in renamed.items()}


def _spread(rows: Tensor) -> Tensor:
    """Add small seeded differences to every row but the first [K, W]."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    noise[0] = 0
    return rows + SEED_SPREAD * rows.float().pow(2).mean().sqrt() * noise


def fit_mixture_tokens(state: dict[str, Tensor], tokens: int, patches: int) -> None:
    """Make K token rows of a source's one, in place: `class_embedding` and its rows of the position embedding."""
    class_key, position_key = "visual.class_embedding", "visual.positional_embedding"
    if class_key not in state or position_key not in state:
        return
    embedding = state[class_key].reshape(-1, state[class_key].shape[-1])  # [1 or K, W]
    if len(embedding) == 1:
        embedding = _spread(embedding.expand(tokens, -1))
    state[class_key] = embedding
    position = state[position_key]  # [1 or K, then L, W]
    if len(position) == patches + 1 and tokens > 1:
        state[position_key] = torch.cat([position[:1].expand(tokens, -1), position[1:]])


def load_weights(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str = "checkpoint", towers_only: bool = False
) -> None:
    """Load a checkpoint's weights, strictly.

    Args:
        model: a `Llip`.
        checkpoint: a state dict, or a dict that holds one under `state_dict`.
        source: what to call it in messages.
        towers_only: weights to start from, of a model without this pooling and objective: what is outside the two
            towers may be missing or left over.

    Raises:
        UserError: keys that are missing, unexpected or of another shape, each with the nearest name.
    """
    state = canonical_names(checkpoint.get("state_dict", checkpoint))
    visual = model.visual
    fit_mixture_tokens(state, visual.mixture_tokens, visual.grid_size[0] * visual.grid_size[1])
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    reshaped = sorted(key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape)
    if towers_only:
        towers = ("visual.", "text.")
        missing = [key for key in missing if key.startswith(towers)]
        unexpected = [key for key in unexpected if key.startswith(towers)]
        for key in [key for key in reshaped if not key.startswith(towers)]:
            reshaped.remove(key)
            state.pop(key)
    problems = [f"missing {key}" for key in missing]
    problems += [f"unexpected {key} (nearest: {', '.join(nearest(key, missing, 1)) or 'none'})" for key in unexpected]
    problems += [f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}" for key in reshaped]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise UserError(f"{source} does not fit the model: {shown}")
    model.load_state_dict({key: value for key, value in state.items() if key in expected}, strict=False)
    log.info("loaded %d of %d tensors from %s", len(expected.keys() & state.keys()), len(expected), source)
