"""Class names and prompts of a task: whether they fit the dataset, and their hashes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llip.clipeval.texts.sources import Texts, TextSource
from llip.errors import UserError, did_you_mean

Name = str | tuple[str, ...]
"""The name of a class, or its synonyms."""


@dataclass(frozen=True)
class Labels:
    """Class names in the order of the labels, and templates with `{c}` for the class."""

    classnames: tuple[Name, ...]
    templates: tuple[str, ...]

    def prompts_of(self, label: int) -> list[str]:
        """Return the class's prompts: every template with every name."""
        names = _names(self.classnames[label])
        return [template.replace("{c}", name) for template in self.templates for name in names]


def _names(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def hash_texts(texts: Sequence[Name]) -> str:
    """Return 16 hex digits of the SHA-256 of the texts in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:16]


def resolve_labels(
    classnames: TextSource,
    prompts: TextSource,
    dataset_names: Sequence[str] | None,
    dataset_prompts: Sequence[str] | None,
    num_classes: int | None,
    class_keys: TextSource | None = None,
) -> Labels:
    """Read class names and templates and match them with the dataset's.

    Args:
        class_keys: the dataset's own name of each of `classnames`, in the same order; so a dataset may have fewer
            classes than there are names. None: `classnames` are the dataset's own, in any order, or others in the
            order of its labels.

    Raises:
        UserError: no such source; another number or order of classes than the dataset's; a template without {c}.
    """
    names = classnames.read(dataset_names, "classnames")
    if class_keys is not None:
        names = _keyed(names, class_keys.read(None, "class_keys"))
    if isinstance(names, Mapping):
        names = _rename(names, dataset_names, classnames)
    elif dataset_names is not None:
        names = _in_label_order(names, dataset_names)
    if num_classes is not None and len(names) != num_classes:
        raise UserError(f"{len(names)} class names, but the entry expects num_classes = {num_classes}")
    if len(names) < 2:
        raise UserError(f"{len(names)} class names; zero-shot classification needs at least 2")
    templates = tuple(template.replace("{}", "{c}") for template in prompts.read(dataset_prompts, "prompts"))
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"prompt {template!r} has no {{c}} where the class name goes")
    return Labels(tuple(name if isinstance(name, str) else tuple(name) for name in names), templates)


def _keyed(names: Texts, keys: Sequence[str]) -> dict[str, str | Sequence[str]]:
    if isinstance(names, Mapping) or len(names) != len(keys):
        given = "an object" if isinstance(names, Mapping) else f"{len(names)} names"
        raise UserError(f"class_keys has {len(keys)} keys, but classnames is {given}; expected one name for each key")
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"class_keys names {twice!r} twice")
    return dict(zip(keys, names, strict=True))


def _rename(names: Mapping[str, str | Sequence[str]], dataset_names: Sequence[str] | None, source: TextSource) -> Texts:
    where = "classnames" if source.kind == "list" else source.value
    if dataset_names is None:
        raise UserError(f"{where} maps the dataset's class names, but the dataset has none; use a list")
    folded = {key.replace("_", " "): name for key, name in names.items()}  # a dataset shows its folders' names as words
    for name in dataset_names:
        if name.replace("_", " ") not in folded:
            raise UserError(f"{where} has no name for the dataset's class {name!r}.{did_you_mean(name, names)}")
    return [folded[name.replace("_", " ")] for name in dataset_names]


def _in_label_order(
    names: Sequence[str | Sequence[str]], dataset_names: Sequence[str]
) -> Sequence[str | Sequence[str]]:
    """Return names in the order of the labels: by name if they are the dataset's own, else as they are.

    Of a class with synonyms the first name counts.

    Raises:
        UserError: another number of names, or names that are partly the dataset's and stand at other classes.
    """
    firsts = [name if isinstance(name, str) else name[0] for name in names]
    given, expected = ([name.lower().replace("_", " ") for name in part] for part in (firsts, dataset_names))
    if len(given) != len(expected):
        first = next((i for i, pair in enumerate(zip(given, expected, strict=False)) if pair[0] != pair[1]), None)
        first = min(len(given), len(expected)) if first is None else first
        here, there = (repr(part[first]) if first < len(part) else "nothing" for part in (firsts, dataset_names))
        raise UserError(
            f"{len(given)} class names for a dataset of {len(expected)} classes; the first difference is class "
            f"{first}: {here}, in the dataset {there}"
        )
    if sorted(given) == sorted(expected):
        return [names[given.index(name)] for name in expected]
    for label, name in enumerate(given):
        if name != expected[label] and expected.count(name) == 1:
            raise UserError(
                f"class {label} is called {firsts[label]!r}, the dataset's name of class {expected.index(name)}; give "
                "class_keys, the dataset's own name of each of classnames"
            )
    return names
