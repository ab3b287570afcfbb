"""Class names and prompts of a task: where they come from, whether they fit the dataset, and their hashes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llip.errors import UserError, did_you_mean
from llip.paths import expand_path

PACKAGE_SOURCES = {
    "open_clip:imagenet": "IMAGENET_CLASSNAMES",
    "open_clip:openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "open_clip:simple": "SIMPLE_IMAGENET_TEMPLATES",
}
"""Names that a catalog may use, and what they are called in the metadata of the OpenCLIP library."""


@dataclass(frozen=True)
class TextSource:
    """Where an entry takes class names or prompts from: `dataset`, `package`, `file`, or the list itself (`list`)."""

    kind: str
    value: str | tuple[str, ...]

    @classmethod
    def parse(cls, value: str | list[str], base: Path) -> "TextSource":
        """Read a catalog's value; a file's relative path belongs to `base`."""
        if isinstance(value, list):
            return cls("list", tuple(value))
        if value == "dataset":
            return cls("dataset", value)
        if not value.endswith((".txt", ".json")) and ":" in value:
            return cls("package", value)
        return cls("file", str(expand_path(value, base)))

    def content(self) -> str:
        """Return what a change of shows that the texts changed: a file's text, else the name or list itself."""
        if self.kind == "file" and Path(self.value).is_file():
            return Path(self.value).read_text(encoding="utf-8", errors="replace")
        return str(self.value)

    def read(self, own: Sequence[str] | None, what: str) -> Sequence[str] | Mapping[str, str]:
        """Return the texts; `own` are the dataset's, `what` names them in errors.

        A .txt file has one text per line. A .json file has a list, or for class names an object from the dataset's own
        name of a class to the name to use.
        """
        if self.kind == "list":
            return self.value
        if self.kind == "dataset":
            if own is None:
                raise UserError(f"the dataset has no {what} of its own; give the entry's {what} as a list or a file")
            return own
        return _from_package(self.value) if self.kind == "package" else _from_file(Path(self.value), what)


@dataclass(frozen=True)
class Labels:
    """Class names in the order of the labels, and templates with `{c}` for the class."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts_of(self, label: int) -> list[str]:
        """Return the class's prompts, one per template."""
        return [template.replace("{c}", self.classnames[label]) for template in self.templates]

    @property
    def classnames_hash(self) -> str:
        return hash_texts(self.classnames)

    @property
    def prompts_hash(self) -> str:
        return hash_texts(self.templates)


def hash_texts(texts: Sequence[str]) -> str:
    """Return 16 hex digits of the SHA-256 of the texts in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:16]


def resolve_labels(
    classnames: TextSource,
    prompts: TextSource,
    own_classnames: Sequence[str] | None,
    own_templates: Sequence[str] | None,
    num_classes: int | None,
) -> Labels:
    """Read class names and templates and hold them against the dataset's.

    Raises:
        UserError: no such source; another number or order of classes than the dataset's; a template without {c}.
    """
    names = classnames.read(own_classnames, "classnames")
    if isinstance(names, Mapping):
        names = _rename(names, own_classnames, classnames)
    elif own_classnames is not None:
        _check_order(names, own_classnames)
    if num_classes is not None and len(names) != num_classes:
        raise UserError(f"{len(names)} class names, but the entry expects num_classes = {num_classes}")
    if len(names) < 2:
        raise UserError(f"{len(names)} class names; zero-shot classification needs at least 2")
    templates = tuple(template.replace("{}", "{c}") for template in prompts.read(own_templates, "prompts"))
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"prompt {template!r} has no {{c}} where the class name goes")
    return Labels(tuple(names), templates)


def _rename(names: Mapping[str, str], own: Sequence[str] | None, source: TextSource) -> list[str]:
    if own is None:
        raise UserError(f"{source.value} maps the dataset's class names, but the dataset has none; use a list")
    for name in own:
        if name not in names:
            raise UserError(f"{source.value} has no name for the dataset's class {name!r}.{did_you_mean(name, names)}")
    return [names[name] for name in own]


def _check_order(names: Sequence[str], own: Sequence[str]) -> None:
    """Refuse another count, and the dataset's own names in another order (the labels would be shuffled)."""
    folded, expected = ([name.lower().replace("_", " ") for name in part] for part in (names, own))
    first = next((i for i, pair in enumerate(zip(folded, expected, strict=False)) if pair[0] != pair[1]), None)
    if first is None:
        first = min(len(folded), len(expected))
    described = [repr(part[first]) if first < len(part) else "nothing" for part in (names, own)]
    where = f"the first difference is class {first}: {described[0]}, in the dataset {described[1]}"
    if len(names) != len(own):
        raise UserError(f"{len(names)} class names for a dataset of {len(own)} classes; {where}")
    if folded != expected and sorted(folded) == sorted(expected):
        raise UserError(f"the class names are in another order than the dataset's labels; {where}")


def _from_package(name: str) -> list[str]:
    if name not in PACKAGE_SOURCES:
        raise UserError(f"unknown source {name!r} of class names or prompts.{did_you_mean(name, PACKAGE_SOURCES)}")
    from open_clip import zero_shot_metadata  # slow to import, and few catalogs need it

    texts = getattr(zero_shot_metadata, PACKAGE_SOURCES[name])
    return [text("{c}") if callable(text) else text for text in texts]


def _from_file(path: Path, what: str) -> list[str] | dict[str, str]:
    if not path.is_file():
        raise UserError(f"{what} file {path} is not there")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{what} file {path} is not JSON: {error}") from error
    texts = list(value.values()) if isinstance(value, dict) and what == "classnames" else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise UserError(f"{what} file {path} holds {value!r:.60}; expected a list of strings")
    return value
