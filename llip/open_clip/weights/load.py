"""Weights into a model: whatever layout they come in, strictly, with a report.

Two ways in. A checkpoint of this project holds exactly the model's tensors. Weights to *start from* (`towers_only`)
come from a model without this pooling and objective, perhaps without mixture tokens: what lies outside the towers, and
a whole mixture head, may be missing, and the towers' tokens are made from the source's (`MixtureTower.fit_source`).
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.open_clip.towers.seeding import SEED_SPREAD
from llip.open_clip.weights.files import find_weights, read_checkpoint
from llip.open_clip.weights.key_names import TOWERS, canonical_names, part
from llip.open_clip.weights.published_head import PREFIX as PUBLISHED_HEAD
from llip.open_clip.weights.published_head import translate_head
from llip.open_clip.weights.report import LoadReport

__all__ = ["SEED_SPREAD", "find_weights", "load_weights", "read_checkpoint"]

log = logging.getLogger(__name__)

_SHOWN = 10
_LEFT_BEHIND = re.compile(r"^(pooling\.|logit_scale$|logit_bias$)")  # of another rung or objective


def _fit_objective(state: dict[str, Tensor], model: Llip) -> list[str]:
    """Take over scale and bias if they were trained together as this model's are, in place.

    The scale of a softmax source (up to 100) without its bias would start a sigmoid objective far from where that can
    learn: every negative pair would count as a positive one. Such a model keeps its own start.
    """
    for key in ("logit_scale", "logit_bias"):
        if key in state:
            state[key] = state[key].reshape(())
    if model.logit_bias is not None and "logit_bias" not in state and "logit_scale" in state:
        del state["logit_scale"]
        return ["logit scale and bias are initialised: the source was trained without a bias"]
    if model.logit_bias is None:
        state.pop("logit_bias", None)
    return []


def _start_from(state: dict[str, Tensor], model: Llip, spread: float) -> list[str]:
    """Make weights of another model into this one's, in place, as far as they are known. Returns what was done."""
    notes = translate_head(state)
    visual = part(state, "visual.")
    notes += model.visual.fit_source(visual, spread)
    for key in [key for key in state if key.startswith("visual.")]:
        del state[key]
    state.update({f"visual.{key}": value for key, value in visual.items()})
    notes += _fit_objective(state, model)
    wanted = {*model.state_dict(), *(f"pooling.{name}" for name in model.pooling.optional_biases)}
    for key in [key for key in state if _LEFT_BEHIND.match(key) and key not in wanted]:
        del state[key]
    return notes


def _adopt_optional(model: Llip, state: dict[str, Tensor]) -> None:
    """Make room for the parts that a model has only if its weights bring them."""
    model.visual.adopt_buffers(part(state, "visual."))
    model.pooling.adopt_biases(part(state, "pooling."))


def _allowed_missing(missing: list[str], expected: Mapping[str, Tensor], loaded: set[str]) -> set[str]:
    """Return what weights to start from need not bring: pooling and objective, and one whole tower of the two."""
    allowed = {key for key in missing if not key.startswith(TOWERS)}
    if any(key.startswith("pooling.") for key in loaded):  # half a head is a mistake
        allowed -= {key for key in missing if key.startswith("pooling.")}
    if "visual.head.latents" in missing:  # a mixture head on another model's backbone
        allowed |= {key for key in missing if key.startswith("visual.head.")}
    for tower in TOWERS:
        whole = {key for key in expected if key.startswith(tower)}
        if whole <= set(missing) and loaded:
            allowed |= whole
    return allowed


def load_weights(
    model: Llip,
    checkpoint: Mapping[str, Any],
    source: str = "checkpoint",
    towers_only: bool = False,
    *,
    strict: bool = True,
    spread: float = SEED_SPREAD,
) -> LoadReport:
    """Load a checkpoint's weights.

    Args:
        model: gets the weights, and the optional parts they bring (offsets of copied tokens, biases of a head).
        checkpoint: a state dict, or a dict that holds one under `state_dict`.
        source: what to call it in messages.
        towers_only: weights to start from, of a model without this pooling and objective: what is outside the two
            towers may be missing, and so may one whole tower, which then starts fresh.
        strict: names and shapes that do not fit are an error; otherwise they are reported and left out.
        spread: size of the seeded differences between mixture tokens made from one, as a share of its size.

    Returns:
        What was loaded, and what was not.

    Raises:
        UserError: names that are missing, unexpected or of another shape, each with the nearest name; or nothing fits.
    """
    raw = checkpoint.get("state_dict", checkpoint)
    if not isinstance(raw, Mapping) or not all(isinstance(x, Tensor) for x in raw.values()):
        raise UserError(f"{source} holds no weights: expected names and tensors, at the top or under 'state_dict'")
    state = canonical_names(raw)
    notes = _start_from(state, model, spread) if towers_only else []
    _adopt_optional(model, state)
    expected = model.state_dict()
    common = expected.keys() & state.keys()
    wrong = [key for key in sorted(common) if expected[key].shape != state[key].shape]
    report = LoadReport(
        loaded=tuple(key for key in expected if key in common and key not in wrong),
        missing=tuple(sorted(expected.keys() - state.keys())),
        unexpected=tuple(sorted(state.keys() - expected.keys())),
        reshaped=tuple((key, tuple(state[key].shape), tuple(expected[key].shape)) for key in wrong),
        notes=tuple(notes),
    )
    allowed = _allowed_missing(list(report.missing), expected, set(report.loaded)) if towers_only else set()
    problems = report.problems([key for key in report.missing if key not in allowed], report.unexpected)
    if (strict and problems) or not report.loaded:
        raise UserError(f"{source} does not fit the model: " + _shorten(problems) + _hint(report, model))
    if problems:
        log.warning("%s: what does not fit is left out: %s", source, "; ".join(problems))
    for tower in TOWERS:
        if not any(key.startswith(tower) for key in report.loaded):
            log.warning("%s brings no %s tower: it starts from fresh weights", source, tower.rstrip("."))
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    log.info(report.summary(source))
    return report


def _shorten(problems: list[str]) -> str:
    published = [line for line in problems if PUBLISHED_HEAD in line]  # always reported key by key
    rest = [line for line in problems if line not in published]
    more = f"; and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
    return "; ".join(rest[:_SHOWN] + published) + more


def _hint(report: LoadReport, model: Llip) -> str:
    """Return the config field to change, where the shape shows it."""
    tokens = [
        shape[-2] for key, shape, _ in report.reshaped if key.endswith(("class_embedding", "cls_token", "latents"))
    ]
    if tokens and tokens[0] != model.visual.mixture_tokens:
        return f". The file has {tokens[0]} mixture tokens: mixture_tokens={tokens[0]}"
    context = [shape[0] for key, shape, _ in report.reshaped if key == "text.positional_embedding"]
    return f". The file's captions have {context[0]} tokens: context_length={context[0]}" if context else ""
