"""The YAML file of an evaluation, read by `evals/` and by training. Imports no torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llip.errors import UserError, did_you_mean, nearest
from llip.paths import expand_path, unset_variables


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation. Each field is a YAML key; paths may hold `~` and `$VARS` and belong to the current folder.

    Attributes:
        eval_name: the program that runs it (`evals/scaffold.py` lists them).
        mc_config_name: run config that the checkpoint must match, as `llip.main` takes it.
        checkpoint_path: the checkpoint. output_dir: folder of results.json and results.md.
        catalog_name: a catalog of llip.clipeval, or a path to a json.
        tasks: names in the catalog; None: all of them.
        batch_size, workers: images per batch and decoding processes, per device.
        prompt_ensemble: feature (CLIP's protocol) or score.
    """

    eval_name: str = "mc"
    mc_config_name: str | None = None
    checkpoint_path: str | None = None
    output_dir: str | None = None
    catalog_name: str = "dataset_catalog.json"
    tasks: tuple[str, ...] | None = None
    batch_size: int = 64
    workers: int = 4
    prompt_ensemble: str = "feature"


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
    return EvalConfig(**{key: _checked(path, key, fields[key].type, value) for key, value in raw.items()})


def _checked(path: Path, key: str, kind: Any, value: Any) -> Any:
    optional = value is None and kind not in (str, int)
    if key == "tasks" and isinstance(value, list) and value and all(isinstance(task, str) for task in value):
        if twice := next((task for task in value if value.count(task) > 1), None):
            raise UserError(f"{path}: tasks names {twice!r} twice")
        return tuple(value)
    if kind is int:
        smallest = 0 if key == "workers" else 1
        if isinstance(value, int) and not isinstance(value, bool) and value >= smallest:
            return value
        raise UserError(f"{path}: {key} = {value!r}; expected an integer, at least {smallest}")
    if key == "prompt_ensemble" and value not in ("feature", "score"):
        raise UserError(f"{path}: prompt_ensemble = {value!r}; expected feature or score")
    if optional or (key != "tasks" and isinstance(value, str) and value):
        return value
    raise UserError(f"{path}: {key} = {value!r}; expected {'a list of task names' if key == 'tasks' else 'a string'}")


def find_eval_file(fname: str) -> Path:
    """Return the path of an evaluation file, or raise a `UserError` that names the nearest one."""
    path = expand_path(fname)
    if path.is_file():
        return Path(fname) if not unset_variables(fname) else path
    here = sorted(str(file) for folder in {Path("config_evals"), Path(fname).parent} for file in folder.glob("*.y*ml"))
    same_name = [file for file in here if Path(file).stem == Path(fname).stem]
    close = same_name or nearest(fname, here)
    hint = f" Did you mean {' or '.join(close)}?" if close else f" There are: {', '.join(here) or 'none'}."
    raise UserError(f"evaluation file {fname!r} is not there.{hint}")
