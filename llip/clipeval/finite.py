"""Refuse features and scores that are not finite: sorting NaN gives every class the same accuracy without an error."""

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from llip.errors import UserError


def require_finite(values: Tensor, model: nn.Module, what: str, name: Callable[[int], str]) -> Tensor:
    """Return `values` [N, ...] if all are finite.

    Args:
        model: computed the values. what: the values, in words. name: describes the input of a row.

    Raises:
        UserError: names the first parameter or buffer that is not finite, else the first such row's input.
    """
    if values.isfinite().all():
        return values
    for parameter, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if bad := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{what} are not finite: {bad} of {tensor.numel()} values of parameter {parameter} are NaN or inf; "
                "the checkpoint is of a diverged run, evaluate an earlier one"
            )
    row = int((~values.isfinite().flatten(1).all(dim=1)).nonzero()[0])
    raise UserError(
        f"{what} are not finite for {name(row)}, though all parameters are; in half precision, evaluate in fp32"
    )
