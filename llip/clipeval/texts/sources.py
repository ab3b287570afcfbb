"""Where class names and prompts come from: the dataset, an installed package, a file, or the catalog itself.

Packages are read as data: nothing of clip-benchmark or timm is imported.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from llip.clipeval.datasets import read_json, read_text
from llip.errors import UserError, did_you_mean
from llip.system.paths import expand_path

Texts = Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]
"""Names or prompts in order (a class may have synonyms), or the dataset's name of a class -> the name to use."""

OPEN_CLIP = {
    "imagenet": "IMAGENET_CLASSNAMES",
    "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
}
"""Names that a catalog may use, and what they are called in the metadata of the OpenCLIP library."""

CLIP_BENCHMARK = {
    "classnames": "datasets/en_classnames.json",
    "prompts": "datasets/en_zeroshot_classification_templates.json",
}
"""The data files of the clip-benchmark package: set -> list."""

TIMM = "data/_info/{}.txt"
"""The data files of timm, one text per line: `timm:imagenet_synsets` is the order of ImageNet's classes."""


@dataclass(frozen=True)
class TextSource:
    """Where an entry takes class names or prompts from: `dataset`, `package`, `file`, or the list itself (`list`)."""

    kind: str
    value: str | tuple[str, ...]

    @classmethod
    def parse(cls, value: str | list[str], base: Path) -> "TextSource":
        """Read a catalog's value; a file's relative path belongs to `base`.

        `labels.json#food101` is one entry of a file that holds several, as the SLIP suite's labels.json does.
        """
        if isinstance(value, list):
            return cls("list", tuple(value))
        if value == "dataset":
            return cls("dataset", value)
        path, hash_sign, key = value.partition("#")
        if not path.endswith((".txt", ".json")) and ":" in value:
            return cls("package", value)
        return cls("file", f"{expand_path(path, base)}{hash_sign}{key}")

    @property
    def file(self) -> Path:
        """The file, without the entry in it; only for kind `file`."""
        return Path(str(self.value).partition("#")[0])

    def content(self) -> str:
        """Return what changes with the texts: the name or list, and the content of a file."""
        text = self.file.read_text(encoding="utf-8", errors="replace") if self._is_readable() else ""
        return f"{self.value}{text}"

    def _is_readable(self) -> bool:
        return self.kind == "file" and self.file.is_file()

    @overload
    def read(self, of_dataset: Sequence[str] | None, what: Literal["class_keys", "prompts"]) -> Sequence[str]: ...
    @overload
    def read(self, of_dataset: Sequence[str] | None, what: str) -> Texts: ...
    def read(self, of_dataset: Sequence[str] | None, what: str) -> Texts:
        """Return the texts; `of_dataset` are the dataset's own, `what` is classnames, class_keys or prompts.

        A .txt file has one text per line. A .json file has a list, or for class names an object from the dataset's own
        name of a class to the name to use; after `#`, the entry of an object of such lists.

        Raises:
            UserError: no such file, entry, name or package; not texts.
        """
        if isinstance(self.value, tuple):
            return self.value
        if self.kind == "dataset":
            if of_dataset is None:
                raise UserError(f"the dataset defines no {what}; give the entry's {what} as a list or a file")
            return of_dataset
        return _from_package(self.value, what) if self.kind == "package" else self._from_file(what)

    def _from_file(self, what: str) -> Texts:
        path, _, key = str(self.value).partition("#")
        where = f"{what} file {path}"
        if self.file.suffix != ".json":
            if key:
                raise UserError(f"{where} is a list of lines and has no entry {key!r}; expected a .json before the #")
            return [line.strip() for line in read_text(self.file, f"{what} file").splitlines() if line.strip()]
        value = read_json(self.file, f"{what} file")
        if key:
            value = _entry(value, key, where)
        return _checked(value, what, f"{where}, entry {key!r}," if key else where)


def _entry(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}; expected an object of name -> list, for #{key}")
    if key not in value:
        raise UserError(f"{where} has no entry {key!r}.{did_you_mean(key, value)}")
    return value[key]


def _checked(value: Any, what: str, where: str) -> Texts:
    """Return texts that are a list; class names may also be one with lists of synonyms, or an object of names."""
    texts = list(value.values()) if isinstance(value, dict) and what == "classnames" else value
    expected = "expected a list of strings"
    if isinstance(value, dict) and any(isinstance(text, list) for text in value.values()):
        expected += f"; it has lists of several sets: add #NAME to the file's name, as #{next(iter(value))}"
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{where} holds {value!r:.60}; {expected}")
    synonyms = what == "classnames" and isinstance(value, list)
    for text in texts:
        group = text if synonyms and isinstance(text, list) else [text]
        if not group or not all(isinstance(name, str) and name for name in group):
            raise UserError(f"{where} holds {text!r:.60}; {expected}")
    return value


def _from_package(source: str, what: str) -> Texts:
    package, _, name = source.partition(":")
    if package not in _PACKAGES:
        known = [f"{known}:" for known in _PACKAGES]
        raise UserError(f"unknown source {source!r} of {what}.{did_you_mean(f'{package}:', known)}")
    return _PACKAGES[package](name, what)


def _from_open_clip(name: str, what: str) -> Texts:
    if name not in OPEN_CLIP:
        known = [f"open_clip:{known}" for known in OPEN_CLIP]
        raise UserError(f"unknown source {f'open_clip:{name}'!r} of {what}.{did_you_mean(f'open_clip:{name}', known)}")
    from open_clip import zero_shot_metadata  # slow to import, and few catalogs need it

    texts = getattr(zero_shot_metadata, OPEN_CLIP[name])
    return [text("{c}") if callable(text) else text for text in texts]


def _from_clip_benchmark(name: str, what: str) -> Texts:
    fix = "install it with `pip install --no-deps clip-benchmark` (only its data files are read)"
    if what not in CLIP_BENCHMARK:
        raise UserError(f"clip_benchmark:{name}: the package has classnames and prompts, but no {what}")
    path = _package_file("clip_benchmark", CLIP_BENCHMARK[what], f"{what} clip_benchmark:{name}", fix)
    value = json.loads(path.read_text(encoding="utf-8"))
    return _checked(_entry(value, name, f"{what} of clip-benchmark ({path.name})"), what, f"{path}, entry {name!r},")


def _from_timm(name: str, what: str) -> Texts:
    path = _package_file("timm", TIMM.format(name), f"{what} timm:{name}", "install another version of timm")
    return path.read_text(encoding="utf-8").splitlines()


_PACKAGES: dict[str, Callable[[str, str], Texts]] = {
    "open_clip": _from_open_clip,
    "clip_benchmark": _from_clip_benchmark,
    "timm": _from_timm,
}


def _package_file(package: str, file: str, needed_for: str, fix: str) -> Path:
    """Return a data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{needed_for}: the package {package.replace('_', '-')} is not installed; {fix}")
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise UserError(f"{needed_for}: the installed package {package.replace('_', '-')} has no {file}; {fix}")
    return path
