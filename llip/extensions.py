"""What a config names and a researcher may bring: poolings, losses, image and caption transforms. Imports no torch.

A name is one that ships with the project, or `path/to/file.py:Name`. The file is imported once per process; a run keeps
a copy in `<run folder>/extensions`, where it is found when the original path is not there.
"""

import importlib
import importlib.util
import shutil
import sys
import traceback
import types
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llip.errors import UserError, did_you_mean, shown
from llip.system.paths import expand_variables

SHIPPED: dict[str, dict[str, str]] = {
    "pooling": {
        "first": "llip.open_clip.pooling:FirstToken",
        "mean": "llip.open_clip.pooling:MeanTokens",
        "learned": "llip.open_clip.pooling:LearnedWeights",
        "text": "llip.open_clip.pooling:TextConditionedPooling",
        "flair": "llip.open_clip.flair:FlairPooling",
    },
    "loss": {
        "sigmoid": "llip.open_clip.objectives.objective:SIGMOID",
        "flair_sampled": "llip.open_clip.objectives.objective:FLAIR_SAMPLED",
        "softmax": "llip.open_clip.objectives.objective:SOFTMAX",
        "softmax_in": "llip.open_clip.objectives.objective:SOFTMAX_IN",
    },
    "image_transform": {},
    "caption_transform": {},
}
"""Config field -> name -> module:attribute of what ships with the project."""
_EXPECTED = {
    "pooling": ("build", "a class with a method `build`, such as a subclass of TextFreePooling"),
    "loss": ("loss", "an Objective"),
    "image_transform": ("__call__", "a function of an image and a seed"),
    "caption_transform": ("__call__", "a function of a caption and a seed"),
}
"""Config field -> (method that its object has, what messages call such an object)."""
FOLDER = "extensions"
"""Folder of a run that holds copies of its files."""

_modules: dict[Path, tuple[tuple[int, int], types.ModuleType]] = {}  # by resolved path, with the file's time and size


def check_extension(field: str, name: str | None) -> None:
    """Raise a UserError for a name that neither ships nor is written `path/to/file.py:Name`."""
    shipped = SHIPPED[field]
    if name is None or name in shipped or _split(name) is not None:
        return
    expected = "path/to/file.py:Name"
    if shipped:
        expected = f"one of {', '.join(map(repr, shipped))}, or {expected}"
    raise UserError(f"config field {field} = {shown(name)}: expected {expected}.{did_you_mean(name, shipped)}")


def find_extension(field: str, name: str) -> Any:
    """Return the object that `name` means for a config field.

    Raises:
        UserError: an unknown name, a file that is missing or does not run, or one that does not define the name or
            defines it as something else.
    """
    check_extension(field, name)
    parts = _split(name)
    if parts is None:
        shipped, _, attribute = SHIPPED[field][name].partition(":")
        return getattr(importlib.import_module(shipped), attribute)
    path, attribute = parts
    module = load_file(path, f"{field} = {name!r}")
    if not hasattr(module, attribute):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise UserError(f"{field} = {name!r}: {path} defines no {attribute!r}.{did_you_mean(attribute, names)}")
    extension, (method, expected) = getattr(module, attribute), _EXPECTED[field]
    if not callable(getattr(extension, method, None)):
        kind = "a class" if isinstance(extension, type) else type(extension).__name__
        raise UserError(f"{field} = {name!r}: expected {expected}, found {kind} {attribute!r}")
    return extension


def load_file(path: Path, needed_for: str) -> types.ModuleType:
    """Import a Python file of the user's; a file that has not changed is imported once.

    Args:
        path: of the file.
        needed_for: named in messages.

    Raises:
        UserError: the file is missing, is not Python, or does not run.
    """
    resolved = path.resolve()
    if not resolved.is_file():
        raise UserError(f"{needed_for}: there is no file {str(path)!r} (looked for {resolved})")
    stamp = (resolved.stat().st_mtime_ns, resolved.stat().st_size)
    if resolved in _modules and _modules[resolved][0] == stamp:
        return _modules[resolved][1]
    name = f"llip_extension_{resolved.stem}_{zlib.crc32(str(resolved).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UserError(f"{needed_for}: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            raise
        reason = describe_failure(error, str(resolved))
        raise UserError(f"{needed_for}: {str(path)!r} does not run: {reason}") from error
    _modules[resolved] = (stamp, module)
    return module


def describe_failure(error: BaseException, file: str) -> str:
    """Return an error of a user's file in one line, with the line of that file where it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, message = [error.lineno], error.msg
    return f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {message}"


def extension_files(fields: Mapping[str, Any]) -> dict[str, Path]:
    """Return config field -> file of those fields of a config, given as a mapping, that name a user's file."""
    split = {field: _split(fields.get(field)) for field in SHIPPED}
    return {field: parts[0] for field, parts in split.items() if parts is not None}


def relocate(fields: Mapping[str, Any], folder: Path, *, prefer: bool = False) -> dict[str, str]:
    """Return config field -> new name where a user's file is to be taken from `folder`.

    Args:
        fields: of a config.
        folder: with copies of the files, as `copy_extensions` writes them.
        prefer: take the copy even where the original is there.
    """
    moved = {}
    for field, path in extension_files(fields).items():
        copy = folder / path.name
        if copy.is_file() and (prefer or not path.is_file()):
            moved[field] = f"{copy}:{fields[field].rpartition(':')[2]}"
    return moved


def copy_extensions(files: Iterable[Path], folder: Path) -> None:
    """Copy a config's files into `folder`, under their own names.

    Raises:
        UserError: a file is missing, or two have one name. OSError: the folder cannot be written.
    """
    by_name: dict[str, Path] = {}
    for path in {path.resolve() for path in files}:
        if not path.is_file():
            copy = folder / path.name
            hint = f"; a copy is {copy}: name it instead, or restore the file" if copy.is_file() else ""
            raise UserError(f"there is no file {str(path)!r}, which the config names{hint}")
        if path.name in by_name:
            raise UserError(f"{by_name[path.name]} and {path} have one name; rename one of them")
        by_name[path.name] = path
    for name, path in by_name.items():
        folder.mkdir(parents=True, exist_ok=True)
        if path != (folder / name).resolve():
            shutil.copyfile(path, folder / name)


def portable_name(name: Any) -> Any:
    """Return a name without the folder of its file: what identifies an experiment wherever its files lie."""
    parts = _split(name)
    return name if parts is None else f"{parts[0].name}:{parts[1]}"


def _split(name: Any) -> tuple[Path, str] | None:
    """Return (file, attribute) of `path/to/file.py:Name`, None for other names."""
    if not isinstance(name, str):
        return None
    file, separator, attribute = name.rpartition(":")
    if not separator or not file.endswith(".py") or not attribute.isidentifier():
        return None
    return Path(expand_variables(file)), attribute
