"""The heads of published checkpoints, Llip's and FLAIR's, as far as they are known, in this project's parametrisation.

Known (METHOD, "Published results"): the head lives under `pred.`, with `pred.out_proj`. *Our reading*: it is a
multi-head attention as PyTorch stores one, its projections packed in `in_proj_weight` or apart as `q_proj`, `k_proj`
and `v_proj`, each with a bias or without. No published file was at hand: what this module accepts is untested on them.

Biases. With attention weights that sum to one in each head,

    z = W_O concat_m( sum_k w_km (v_km + b_V^m) ) + b_O = W_O concat_m( sum_k w_km (v_km + b_V^m + u^m) ),  W_O u = b_O

so value and output biases together are one vector added to every value: one more row of P_i with weight 1 in each head,
and no change to the scores' arithmetic. W_O must reach b_O: checked, not assumed. A key bias adds the same number to
every logit of a softmax and has no effect; a query bias has one and is kept.

FLAIR's head lies under `visual_proj.` and has the names of `flair.FlairPooling`. No file of FLAIR was at hand either.
"""

import torch
from torch import Tensor

from llip.errors import UserError

PREFIX = "pred."
_FLAIR = "visual_proj."

_PARTS = ("q_proj", "k_proj", "v_proj")
_REACHED = 1e-3  # share of the output bias that may stay out of W_O's reach


def _separate(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the head with packed projections taken apart and PyTorch's two spellings of the separate ones joined."""
    apart = {}
    for key, value in head.items():
        if key in ("in_proj_weight", "in_proj_bias") and len(value) % 3 == 0:
            for name, piece in zip(_PARTS, value.chunk(3), strict=True):
                apart[f"{name}.{key.removeprefix('in_proj_')}"] = piece
        elif key.removesuffix("_weight") in _PARTS:  # MultiheadAttention with kdim or vdim
            apart[f"{key.removesuffix('_weight')}.weight"] = value
        else:
            apart[key] = value
    return apart


def _fold_output_bias(out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Return u [D] with W_O u = b_O.

    Raises:
        UserError: W_O does not reach the bias, so that no vector added to the values stands for it.
    """
    weight, bias = out_weight.double(), out_bias.double()
    solution = torch.linalg.lstsq(weight, bias[:, None], driver="gelsd").solution[:, 0]
    left = (weight @ solution - bias).norm() / bias.norm()
    if left > _REACHED:
        raise UserError(
            f"{PREFIX}out_proj.bias cannot be kept: {left:.1%} of it is out of reach of {PREFIX}out_proj.weight, which "
            "is singular; remove the bias from the file to load the rest"
        )
    return solution


def translate_head(state: dict[str, Tensor]) -> list[str]:
    """Rename a published head to `pooling.`, in place, Llip's biases folded; what is not understood keeps its name.

    Returns:
        What was done, one sentence each; empty where the file has no such head.

    Raises:
        UserError: an output bias that cannot be folded.
    """
    if flair := [key for key in state if key.startswith(_FLAIR)]:
        for key in flair:
            state[f"pooling.{key.removeprefix(_FLAIR)}"] = state.pop(key)
        return ["head of FLAIR's layout (untested on the published files)"]
    head = _separate({key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)})
    if not head:
        return []
    notes = ["head of the published layout (untested on the published files)"]
    for name in (*_PARTS, "out_proj"):
        if f"{name}.weight" in head:
            state[f"pooling.{name}.weight"] = head.pop(f"{name}.weight")
    biases = {name: head.pop(f"{name}.bias", None) for name in (*_PARTS, "out_proj")}
    value = torch.zeros(()).double() if biases["v_proj"] is None else biases["v_proj"].double()
    out, out_weight = biases["out_proj"], state.get("pooling.out_proj.weight")
    if out is not None and out_weight is not None and out.any():
        value = value + _fold_output_bias(out_weight, out)
        notes.append("output bias folded into the value bias")
    elif out is not None and out.any():
        head["out_proj.bias"] = out
    if value.any():
        state["pooling.v_proj.bias"] = value.float()
    if biases["q_proj"] is not None and biases["q_proj"].any():
        state["pooling.q_proj.bias"] = biases["q_proj"]
    if biases["k_proj"] is not None:
        notes.append("key bias dropped: it has no effect")
    state.update({PREFIX + key: value for key, value in head.items()})
    return notes
