"""The YAML file of an evaluation, read by `evals/` and by training. Imports no torch."""

import dataclasses
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llip.errors import UserError, did_you_mean, nearest, shown
from llip.system.paths import expand_path, unset_variables

SHIPPED = Path(__file__).parents[2] / "config_evals"
"""Evaluation files that ship with the project, in a checkout and in an installed wheel."""

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation. Each field is a YAML key; paths may contain `~` and `$VARS`, relative to the current folder.

    Raises:
        UserError: a wrong type or value; names all of them.

    Attributes:
        eval_name: the program that runs it: mc.
        mc_config_name: run config that the checkpoint must match, as `llip train` takes it.
        checkpoint_path: a checkpoint, or an exported folder.
        model: instead of these two, anything that `llip.open_model` opens: a checkpoint, an exported folder or its
            safetensors file, a folder with an open_clip_config.json, or an OpenCLIP model by name.
        pretrained: weights of an OpenCLIP model given by name: a tag, a file or a folder.
        precision: of the towers on GPUs; None: the run config's, fp32 without one.
        output_dir: folder of results.json and results.md.
        catalog_name: a catalog of llip.clipeval, or a path to a json.
        ema: evaluate the moving average of the weights (training field ema_decay) instead.
        tasks: names in the catalog; None: all of them.
        batch_size, workers: images per batch and decoding processes, per device.
        prompt_ensemble: feature (CLIP's protocol) or score.
        shortlist: retrieval scores exactly only this many candidates per image and per caption; None: every pair.
        cache_dir: folder of class text features; None: $LLIP_CACHE, else <output_dir>/cache.
        compare_with: earlier results (results.json or folder) that the bar chart shows beside this evaluation's.
        references: name -> percent, averages that the bar chart shows as lines.
    """

    eval_name: str = "mc"
    mc_config_name: str | None = None
    checkpoint_path: str | None = None
    model: str | None = None
    pretrained: str | None = None
    precision: str | None = None
    output_dir: str | None = None
    catalog_name: str = "dataset_catalog.json"
    ema: bool = False
    tasks: tuple[str, ...] | None = None
    batch_size: int = 64
    workers: int = 4
    prompt_ensemble: str = "feature"
    shortlist: int | None = None
    cache_dir: str | None = None
    compare_with: tuple[str, ...] = ()
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        mistakes = [_mistake(field.name, field.type, getattr(self, field.name)) for field in dataclasses.fields(self)]
        if any(mistakes):
            raise UserError("; ".join(filter(None, mistakes)))

    @property
    def output_folder(self) -> Path:
        """Folder of the results; only for an evaluation with `output_dir`."""
        assert self.output_dir is not None, "a program requires it"
        return _folder("output_dir", self.output_dir)

    @property
    def cache_folder(self) -> Path:
        """Folder of class text features; only for an evaluation with `output_dir`."""
        return _folder("cache_dir", self.cache_dir or os.environ.get("LLIP_CACHE") or f"{self.output_dir}/cache")


def _folder(key: str, text: str) -> Path:
    """Return a folder to write to; a variable that is not set would become part of its name."""
    path = expand_path(text)
    if unset := unset_variables(path):
        raise UserError(f"{key} = {text!r}: the environment variable {unset[0]} is not set")
    return path


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                line = f"line {key.start_mark.line + 1}"
                raise UserError(f"{self.name}, {line}: key {key.value!r} is given twice; remove one of them")
            keys.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def load_eval_config(fname: str | Path) -> EvalConfig:
    """Read an evaluation's YAML.

    Raises:
        UserError: no such file (names the nearest), not YAML, an unknown key or one given twice, a wrong type or value.
    """
    path = find_eval_file(str(fname))
    try:
        with path.open(encoding="utf-8") as file:
            raw = yaml.load(file, _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}; expected lines of `key: value`")
    fields = {field.name: field.type for field in dataclasses.fields(EvalConfig)}
    for key in raw:
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r}.{did_you_mean(str(key), fields)}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in raw.items()
        if value is not None or fields[key] in (str, int)
    }
    try:
        return EvalConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _mistake(key: str, kind: Any, value: Any) -> str | None:
    """Describe what is wrong with a key's value, if anything."""
    accepts, expected = _RULES.get(key) or _RULES[kind]
    if value is None and isinstance(kind, types.UnionType):
        return None
    if not accepts(value):
        return f"{key} = {shown(list(value) if isinstance(value, tuple) else value)}; expected {expected}"
    twice = next((item for item in value if value.count(item) > 1), None) if isinstance(value, tuple) else None
    return f"{key} names {twice!r} twice" if twice else None


def _integer(smallest: int, largest: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and smallest <= value <= largest, f"an integer, {smallest} to {largest:,}"


def _strings(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_text, value))


def _percentages(value: Any) -> bool:
    numbers = isinstance(value, dict) and all(type(item) in (int, float) for item in value.values())
    return numbers and all(isinstance(name, str) and 0 <= item <= 100 for name, item in value.items())


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


_STRING = (_text, "a string")
_RULES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: _STRING,
    str | None: _STRING,
    bool: (lambda value: isinstance(value, bool), "true or false"),
    "eval_name": (lambda value: value == "mc", "mc"),
    "tasks": (lambda value: _strings(value) and bool(value), "a list of task names"),
    "compare_with": (_strings, "a list of results.json files or their folders"),
    "references": (_percentages, "lines of `name: percent`, between 0 and 100"),
    "precision": (lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "prompt_ensemble": (lambda value: value in ("feature", "score"), "feature or score"),
    "batch_size": _integer(1, 1 << 16),
    "workers": _integer(0, 1 << 10),
    "shortlist": _integer(10, 1 << 30),  # R@10 is measured
}
"""Key, or type of a field without a rule of its own -> (whether a value is accepted, the expected value in words)."""


def find_eval_file(fname: str) -> Path:
    """Return the path of an evaluation file: as given, else the shipped `config_evals/NAME.yaml`.

    Raises:
        UserError: there is neither; names the nearest files.
    """
    path = expand_path(fname)
    if path.is_file():
        return Path(fname) if not unset_variables(fname) else path
    if Path(fname).parent == Path(SHIPPED.name) and (SHIPPED / Path(fname).name).is_file():
        return SHIPPED / Path(fname).name
    beside = {str(file) for folder in {Path(SHIPPED.name), Path(fname).parent} for file in folder.glob("*.y*ml")}
    here = sorted(beside | {f"{SHIPPED.name}/{file.name}" for file in SHIPPED.glob("*.yaml")})
    same_name = [file for file in here if Path(file).stem == Path(fname).stem]
    close = same_name or nearest(fname, here)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" There are: {', '.join(here) or 'none'}."
    raise UserError(f"evaluation file {fname!r} is not there.{hint}")
