"""What the value of a config field may be: its type and its bounds. Imports no torch."""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from llip.errors import UserError, did_you_mean, shown
from llip.system.paths import expand_variables


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that a field may take, and how a message describes them."""

    expected: str
    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and (isinstance(value, int) or math.isfinite(value))


AT_LEAST_1 = Bounds("at least 1", 1, 2**31 - 1)
FROM_0 = Bounds("0 or more", 0, 2**53)
ABOVE_0 = Bounds("more than 0", 0, 2**31, includes_low=False)
FROM_0_TO_1 = Bounds("a number from 0 to 1", 0, 1)
FROM_0_BELOW_1 = Bounds("a number from 0 to 1 (1 excluded)", 0, 1, includes_high=False)
INT64 = Bounds("an integer of 64 bits", -(2**63), 2**63 - 1)
SIZE = Bounds("at least 1", 1, 16_384)


@contextlib.contextmanager
def collect_errors() -> Iterator[list[str]]:
    """Yield a list of messages, and raise them at the end as one UserError."""
    messages: list[str] = []
    yield messages
    if messages:
        raise UserError("; ".join(messages))


def is_union(kind: Any) -> bool:
    """Return whether a field's declared type is one of several."""
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, without none."""
    return [part for part in typing.get_args(kind) if part is not types.NoneType]


def type_name(kind: Any) -> str:
    """Return a field's declared type in words."""
    if typing.get_origin(kind) is Literal:
        values = typing.get_args(kind)
        return "one of " * (len(values) > 1) + ", ".join(map(repr, values))
    if is_union(kind):
        return " or ".join("none" if part is types.NoneType else type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def checked(name: str, kind: Any, value: Any) -> Any:
    """Return `value` as the field's declared type, or raise the error that names field, value and type."""
    if is_union(kind):
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        for part in alternatives(kind):
            with contextlib.suppress(UserError):
                return checked(name, part, value)
        raise UserError(f"config field {name} = {shown(value)}: expected {type_name(kind)}")
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    hint = did_you_mean(str(value), typing.get_args(kind)) if typing.get_origin(kind) is Literal else ""
    raise UserError(f"config field {name} = {shown(value)}: expected {type_name(kind)}.{hint}")


def check_bounds(name: str, value: Any, bounds: Bounds | None) -> None:
    """Raise a UserError that names field, value and bounds where `value` is a number outside `bounds`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if bounds is not None and is_number and value not in bounds:
        limit = f" and at most {bounds.high:,}" if value > bounds.high > 1 else ""
        raise UserError(f"config field {name} = {shown(value)}: expected {bounds.expected}{limit}")


def check_text(name: str, value: Any, default: Any) -> None:
    """Raise a UserError for text that no path, pattern or name can be, and for none where the default is not empty."""
    if value == "" != default:
        raise UserError(f"config field {name} is empty; the default is {name}={default or 'none'}")
    if any("\0" in text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)):
        raise UserError(f"config field {name} = {shown(value)}: expected text without null characters")


def parse_window(text: str) -> tuple[int, int]:
    """Return (first, last) step of `FIRST-LAST`, or of a single step.

    Raises:
        UserError: the text has another form.
    """
    match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"config field profile_steps = {shown(text)}: expected FIRST-LAST, for instance 20-25")
    return first, last


def expanded(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Expand `~` and variables in a path, or in each of several."""
    if value is None:
        return None
    return expand_variables(value) if isinstance(value, str) else tuple(map(expand_variables, value))
