"""From what a dataset says of an image to its class, where that is not a class number: declared in the catalog.

{"values": [3, 4, 5]}               the class is the place of the value in the list
{"closest": {"types": ["Car", "Van"], "field": "location", "axis": 2, "edges": [8, 20]}}
    the value says of each object in the image its "type" and a "field" of numbers; of the objects of these types
    the smallest field[axis] decides: class 0 up to the first edge, then one class per interval, and one more for
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
    """Return the function from a dataset's value to a class number; for an empty rule the value is the number.

    The function raises ValueError for a value that has no class.

    Raises:
        UserError: a rule that is none of the above.
    """
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_RULES).iter_errors(dict(declared)))
    if error is not None:
        raise UserError(
            f"label = {dict(declared)!r:.120}; expected {{'values': [...]}} or {{'closest': ...}}: {error.message}"
        )
    if "values" in declared:
        return lambda value: _place(value, declared["values"])
    if "closest" in declared:
        return lambda value: _interval(value, **declared["closest"])
    return _number


def _number(value: Any) -> int:
    if value is None:
        raise ValueError("the dataset has no label for this image")
    return int(value)


def _place(value: Any, values: list[Any]) -> int:
    if value not in values:
        raise ValueError(f"the dataset's value {value!r:.60} is none of {', '.join(map(str, values))}")
    return values.index(value)


def _interval(objects: Any, types: list[str], field: str, axis: int, edges: list[float]) -> int:
    if objects is None:
        raise ValueError("the dataset has no label for this image")
    found = [item[field][axis] for item in objects if item["type"] in types]
    return bisect.bisect_left(sorted(edges), min(found)) if found else len(edges) + 1
