"""From a dataset's annotation of an image to its class, for annotations that are not class numbers.

A catalog entry declares the rule:

{"values": [3, 4, 5]}               the class is the position of the annotation in the list
{"closest": {"types": ["Car", "Van"], "field": "location", "axis": 2, "edges": [8, 20]}}
    the annotation is a list of objects with a "type" and a "field" of numbers; the smallest field[axis] of the
    objects of these types decides: class 0 up to the first edge, then one class per interval, and one more for
    images without such an object
"""

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema

from llip.errors import UserError

_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1, "uniqueItems": True}
_RULES = {
    "type": "object",
    "properties": {
        "values": {"type": "array", "minItems": 2, "uniqueItems": True},
        "closest": {
            "type": "object",
            "properties": {
                "types": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "field": {"type": "string"},
                "axis": {"type": "integer", "minimum": 0},
                "edges": _NUMBERS,
            },
            "required": ["types", "field", "axis", "edges"],
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
    "maxProperties": 1,
}


def class_rule(declared: Mapping[str, Any]) -> Callable[[Any], int]:
    """Return the function from an annotation to a class number; for an empty rule the annotation is the number.

    The function raises ValueError for an annotation without a class.

    Raises:
        UserError: not a rule of the above form.
    """
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_RULES).iter_errors(dict(declared)))
    if error is not None:
        raise UserError(
            f"label = {dict(declared)!r:.120}; expected {{'values': [...]}} or {{'closest': ...}}: {error.message}"
        )
    if "values" in declared:
        return lambda value: _position(value, declared["values"])
    if "closest" in declared:
        return lambda value: _interval(value, **declared["closest"])
    return _number


def _number(value: Any) -> int:
    if value is None:
        raise ValueError("the dataset has no label for this image")
    return int(value)


def _position(value: Any, values: list[Any]) -> int:
    if value not in values:
        raise ValueError(f"the dataset's value {value!r:.60} is none of {', '.join(map(str, values))}")
    return values.index(value)


def _interval(objects: Any, types: list[str], field: str, axis: int, edges: list[float]) -> int:
    if objects is None:
        raise ValueError("the dataset has no label for this image")
    distances = [item[field][axis] for item in objects if item["type"] in types]
    return bisect.bisect_left(sorted(edges), min(distances)) if distances else len(edges) + 1
