"""The catalog: a JSON file `name -> entry` with each dataset's path, metrics, class names and prompts.

    llip catalog --check [CATALOG] [--json]      which datasets are on this machine, and where to get the others

Relative paths belong to the catalog's folder; `$VARS`, `${VAR:-default}` and `~` are expanded. An entry
is checked by a JSON Schema: the common fields of `catalog.schema.json` and those that its dataset type declares.
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema

from llip.clipeval.datasets import DATASET_TYPES, DatasetSpec, load_dataset_types
from llip.clipeval.eval_config import EvalConfig, load_eval_config
from llip.clipeval.metrics import CLASSIFICATION, metric_names
from llip.clipeval.texts.sources import TextSource
from llip.errors import UserError, did_you_mean, nearest, shown
from llip.system.paths import expand_path

CATALOG_FOLDER = Path(__file__).parents[1]
DEFAULT_CATALOG = "dataset_catalog.json"
MAX_NAME = 200
"""Longest name of a task, percent-encoded: it becomes the name of a file of outcomes."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One task of a catalog.

    Attributes:
        metrics: from one pass over the images; the first one enters means over tasks.
        data: the dataset, an instance of its type.
        classnames, prompts: where class names and templates come from (classification only).
        class_keys: the dataset's own names of `classnames`, where it may have fewer classes; see `resolve_labels`.
        label_names: the dataset's own class names in the order of its labels, where its files have none.
        num_classes, num_images: what the dataset is expected to have; None: not checked.
        source, download: where the dataset comes from, in words, and a command that fetches it; both for people.
        fingerprint: hash of the entry, its paths and its texts.
    """

    name: str
    type: str
    metrics: tuple[str, ...]
    data: DatasetSpec
    classnames: TextSource
    prompts: TextSource
    class_keys: TextSource | None
    label_names: tuple[str, ...] | None
    num_classes: int | None
    num_images: int | None
    source: str | None
    download: str | None
    fingerprint: str

    @property
    def metric(self) -> str:
        """The first metric."""
        return self.metrics[0]

    @property
    def kind(self) -> str:
        """classification or retrieval."""
        return self.data.kind

    @property
    def texts(self) -> dict[str, TextSource]:
        """Field -> source of class names and prompts; none in retrieval."""
        texts = {"classnames": self.classnames, "prompts": self.prompts, "class_keys": self.class_keys}
        return {field: source for field, source in texts.items() if source and self.kind == CLASSIFICATION}


class Catalog(dict[str, Entry]):
    """The entries of one catalog file, in its order."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.path = path

    def __missing__(self, name: str) -> Entry:
        raise UserError(f"unknown task {name!r} in catalog {self.path}.{did_you_mean(name, self)}")

    def select(self, tasks: Sequence[str] | None) -> tuple[Entry, ...]:
        """Return the entries of `tasks` (all of them for None) or raise the `UserError` of the first unknown one."""
        return tuple(self[name] for name in (self if tasks is None else tasks))


def load_catalog(name: str | Path = DEFAULT_CATALOG) -> Catalog:
    """Read and check a catalog.

    Args:
        name: a file of this package (`dataset_catalog.json`) or a path.

    Raises:
        UserError: no such file, not JSON, or an entry that the schema refuses (names entry, field, value, expectation).
    """
    path = find_catalog(str(name))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=functools.partial(_unique, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"catalog {path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"catalog {path} holds {type(raw).__name__}; expected an object of task name -> entry")
    load_dataset_types()
    return Catalog(path, {task: _parse_entry(path, task, entry) for task, entry in raw.items()})


def load_evaluation(path: str | Path) -> tuple[EvalConfig, tuple[Entry, ...]]:
    """Read an evaluation file and the entries of its tasks.

    Raises:
        UserError: as `load_eval_config` and `load_catalog`, and for a task that the catalog does not have.
    """
    config = load_eval_config(path)
    return config, load_catalog(config.catalog_name).select(config.tasks)


def find_catalog(name: str) -> Path:
    """Return the file that `name` means: a path, else a catalog of this package."""
    for path in (expand_path(name), CATALOG_FOLDER / name, CATALOG_FOLDER / f"{name}.json"):
        if path.is_file():
            return path
    shipped = [path.name for path in CATALOG_FOLDER.glob("*.json") if not path.name.endswith(".schema.json")]
    raise UserError(f"catalog {name!r} is neither a file nor a catalog of llip.clipeval.{did_you_mean(name, shipped)}")


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"catalog {path} has {twice!r} twice")
    return dict(pairs)


def _parse_entry(path: Path, task: str, raw: Any) -> Entry:
    where = f"catalog {path}, entry {shown(task)}"
    if not task.isprintable() or not 0 < len(quote(task)) <= MAX_NAME:
        raise UserError(f"{where}: expected a name of printable characters, short enough for a file name")
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {raw!r:.60} is not an object; expected {{'type': ..., 'path': ..., ...}}")
    if "root" in raw and "path" not in raw:
        raw = {"path" if key == "root" else key: value for key, value in raw.items()}
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in DATASET_TYPES:
        close = nearest(str(kind), DATASET_TYPES)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{where}: type = {kind!r}; the known types are {', '.join(sorted(DATASET_TYPES))}.{hint}")
    spec = DATASET_TYPES[kind]
    _check_schema(where, entry_schema(spec), raw)
    base = path.parent
    fields = {field.name: field for field in dataclasses.fields(spec)}
    data = spec(**{key: _typed(fields[key].type, value, base) for key, value in raw.items() if key in fields})
    classnames = TextSource.parse(raw.get("classnames", "dataset"), base)
    prompts = TextSource.parse(raw.get("prompts", "dataset"), base)
    class_keys = TextSource.parse(raw["class_keys"], base) if "class_keys" in raw else None
    deciding = {key: value for key, value in raw.items() if key not in FOR_PEOPLE}
    texts = [source.content() for source in (classnames, prompts, class_keys) if source is not None]
    identity = json.dumps([deciding, str(data), *texts], sort_keys=True)
    return Entry(
        name=task,
        type=kind,
        metrics=_metrics(where, spec.kind, raw),
        data=data,
        classnames=classnames,
        prompts=prompts,
        class_keys=class_keys,
        label_names=tuple(raw["label_names"]) if "label_names" in raw else None,
        num_classes=raw.get("num_classes"),
        num_images=raw.get("num_images"),
        source=raw.get("source"),
        download=_with_path(raw.get("download"), data),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
    )


def _metrics(where: str, kind: str, raw: dict[str, Any]) -> tuple[str, ...]:
    """Return the metrics of an entry: its `metrics`, else its `metric`, else the first that its kind has."""
    known = metric_names(kind)
    if "metric" in raw and "metrics" in raw:
        raise UserError(f"{where}: both metric and metrics; name all of them in metrics")
    metrics = tuple(raw.get("metrics", [raw.get("metric", known[0])]))
    for metric in metrics:
        if metric not in known:
            close = nearest(metric, known)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{where}: metric = {metric!r}; a {kind} task has one of {', '.join(known)}{hint}")
    return metrics


FOR_PEOPLE = ("note", "source", "download")
"""Fields that do not affect results."""


def _with_path(command: str | None, data: DatasetSpec) -> str | None:
    """Return a download command with the dataset's folder in it."""
    if command is None or not isinstance(path := getattr(data, "path", None), Path):
        return command
    return command.replace("{path}", str(path)).replace("{parent}", str(path.parent))


def _plain_type(annotation: Any) -> Any:
    """Return the type of a field of a dataset type, without `| None` and type arguments."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    if isinstance(annotation, types.UnionType):
        assert len(kinds) == 1, f"a catalog field has one type, not {annotation}"
        return kinds[0]
    return typing.get_origin(annotation) or annotation


def _typed(annotation: Any, value: Any, base: Path) -> Any:
    return expand_path(value, base) if _plain_type(annotation) is Path else value


_JSON_TYPES = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean", Mapping: "object"}


@functools.cache
def entry_schema(spec: type[DatasetSpec]) -> dict[str, Any]:
    """Return the JSON Schema of entries of one dataset type: the common fields and those of the dataclass `spec`."""
    schema = json.loads(Path(__file__).with_name("catalog.schema.json").read_text(encoding="utf-8"))
    if spec.kind != CLASSIFICATION:
        for name in ("classnames", "prompts", "class_keys", "label_names", "num_classes"):
            del schema["properties"][name]
    for field in dataclasses.fields(spec):
        kind = _JSON_TYPES[_plain_type(field.type)]
        limits = {"minimum": 0, "description": "a whole number, at least 0"} if kind == "integer" else {}
        schema["properties"][field.name] = {"type": kind, **limits}
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            schema["required"].append(field.name)
    return schema


def _check_schema(where: str, schema: dict[str, Any], raw: dict[str, Any]) -> None:
    """Raise a `UserError` for the first mistake of an entry."""
    known = schema["properties"]
    for field in raw:
        if field not in known:
            raise UserError(f"{where}: type {raw['type']!r} has no field {field!r}.{did_you_mean(field, known)}")
    for field in schema["required"]:
        if field not in raw:
            raise UserError(f"{where}: field {field!r} is missing; type {raw['type']!r} needs it")
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(raw))
    if error is not None:
        field = ".".join(map(str, error.absolute_path))
        expected = error.schema.get("description") or error.schema.get("type") or error.message
        raise UserError(f"{where}: {field} = {error.instance!r:.80}; expected {expected}")
