"""The YAML file of an evaluation, read by `evals/` and by training. Imports no torch."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llip.errors import UserError, did_you_mean, nearest
from llip.system.paths import expand_path, unset_variables

SHIPPED = Path(__file__).parents[2] / "config_evals"
"""Evaluation files that ship with the project, in a checkout and in an installed wheel."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation. Each field is a YAML key; paths may hold `~` and `$VARS` and belong to the current folder.

    Attributes:
        eval_name: the program that runs it (`evals/scaffold.py` lists them).
        mc_config_name: run config that the checkpoint must match, as `llip.main` takes it.
        checkpoint_path: the checkpoint. output_dir: folder of results.json and results.md.
        catalog_name: a catalog of llip.clipeval, or a path to a json.
        ema: evaluate the moving average of the weights (training field ema_decay) in their place.
        tasks: names in the catalog; None: all of them.
        batch_size, workers: images per batch and decoding processes, per device.
        prompt_ensemble: feature (CLIP's protocol) or score.
        shortlist: retrieval scores exactly only this many candidates per image and per caption; None: every pair.
        cache_dir: folder of class text features; $LLIP_CACHE when left out, else <output_dir>/cache.
        compare_with: earlier results (results.json or folder) that the bar chart shows beside this evaluation's.
        references: name -> percent, averages that the bar chart shows as lines.
    """

    eval_name: str = "mc"
    mc_config_name: str | None = None
    checkpoint_path: str | None = None
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

    @property
    def cache_folder(self) -> Path:
        """Where class text features are kept; needs `output_dir`."""
        return expand_path(self.cache_dir or os.environ.get("LLIP_CACHE") or f"{self.output_dir}/cache")


def load_eval_config(fname: str | Path, required: Sequence[str] = ()) -> EvalConfig:
    """Read an evaluation's YAML.

    Args:
        fname: path of the file.
        required: keys that must be there.

    Raises:
        UserError: no such file (names the nearest), not YAML, a leftover or missing key, a wrong type or value.
    """
    path = find_eval_file(str(fname))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}; expected lines of `key: value`")
    fields = {field.name: field for field in dataclasses.fields(EvalConfig)}
    for key in raw:
        if key not in fields:
            raise UserError(f"{path}: unknown key {key!r}.{did_you_mean(str(key), fields)}")
    for key in required:
        if raw.get(key) is None:
            raise UserError(f"{path}: key {key!r} is missing; this program needs it")
    values = {key: _checked(path, key, fields[key].type, value) for key, value in raw.items()}
    return EvalConfig(**{key: value for key, value in values.items() if value is not dataclasses.MISSING})


def _checked(path: Path, key: str, kind: Any, value: Any) -> Any:
    """Return a key's value as its field has it."""
    if value is None and kind not in (str, int):
        return dataclasses.MISSING
    accepts, expected = _RULES.get(key) or _RULES[kind]
    if not accepts(value):
        raise UserError(f"{path}: {key} = {value!r}; expected {expected}")
    if isinstance(value, list):
        if twice := next((item for item in value if value.count(item) > 1), None):
            raise UserError(f"{path}: {key} names {twice!r} twice")
        return tuple(value)
    return value


def _integer(smallest: int) -> tuple[Callable[[Any], bool], str]:
    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= smallest

    return accepts, f"an integer, at least {smallest}"


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _percentages(value: Any) -> bool:
    numbers = isinstance(value, dict) and all(type(item) in (int, float) for item in value.values())
    return numbers and all(isinstance(name, str) and 0 <= item <= 100 for name, item in value.items())


_STRING = (lambda value: isinstance(value, str) and bool(value), "a string")
_RULES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: _STRING,
    str | None: _STRING,
    bool: (lambda value: isinstance(value, bool), "true or false"),
    "tasks": (_strings, "a list of task names"),
    "compare_with": (_strings, "a list of results.json files or their folders"),
    "references": (_percentages, "lines of `name: percent`, between 0 and 100"),
    "prompt_ensemble": (lambda value: value in ("feature", "score"), "feature or score"),
    "batch_size": _integer(1),
    "workers": _integer(0),
    "shortlist": _integer(10),  # R@10 is measured
}
"""Key, or type of a field without a rule -> what it accepts, in code and in words."""


def find_eval_file(fname: str) -> Path:
    """Return the path of an evaluation file: as written, else the one that ships as `config_evals/NAME.yaml`.

    Raises:
        UserError: neither is there; names the nearest ones.
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
