"""Configs by name, `path/to/file.py:function`, and `field=value` overrides. Imports no torch."""

import contextlib
import importlib
import inspect
import pkgutil
import types
import typing
from pathlib import Path
from types import FunctionType
from typing import Any

from llip.config_checks import alternatives, checked, collect_errors, is_union, type_name
from llip.configs import Config, check_field_name, config_fields
from llip.errors import UserError, did_you_mean, shown
from llip.extensions import describe_failure, load_file


def parse_value(name: str, text: str) -> Any:
    """Read `text` from the command line as the declared type of field `name`.

    Accepts Python's number forms (5e-4, 400_000_000), true/false, none, bare strings and comma lists.

    Raises:
        UserError: the text does not read as that type.
    """
    kind = config_fields()[name].type
    return _parse(name, kind, text)


def _parse(name: str, kind: Any, text: str) -> Any:
    if is_union(kind):
        if text.lower() == "none" and types.NoneType in typing.get_args(kind):
            return None
        for part in alternatives(kind):
            with contextlib.suppress(UserError):
                return checked(name, part, _parse(name, part, text))
        raise UserError(f"config field {name} = {shown(text)}: expected {type_name(kind)}")
    if text.lower() == "none" and typing.get_origin(kind) is tuple:
        return ()
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            number = float(text) if "e" in text.lower() or "." in text else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"config field {name} = {shown(text)}: expected {type_name(kind)}") from None
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _parse_override(word: str) -> tuple[str, Any]:
    name, separator, text = word.partition("=")
    if not separator:
        raise UserError(f"cannot read {shown(word)}: overrides are written field=value, for instance batch_size=64")
    check_field_name(name)
    return name, parse_value(name, text)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Return the typed values of `field=value` words; a `UserError` lists all words that cannot be read."""
    changes: dict[str, Any] = {}
    with collect_errors() as errors:
        for word in words:
            try:
                name, value = _parse_override(word)
                if name in changes:
                    raise UserError(f"config field {name} is given twice")
                changes[name] = value
            except UserError as error:
                errors.append(str(error))
    return changes


def list_configs() -> dict[str, FunctionType]:
    """Return every config function in `llip.run_configs` by name."""
    package = importlib.import_module("llip.run_configs")
    configs: dict[str, FunctionType] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        functions = _functions(importlib.import_module(f"{package.__name__}.{module_info.name}"))
        public = {name: function for name, function in functions.items() if not name.startswith("_")}
        assert not configs.keys() & public, f"two configs have the same name: {configs.keys() & public}"
        configs |= public
    return configs


def _functions(module: types.ModuleType) -> dict[str, FunctionType]:
    """Return the functions that a module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }


def _function_from_file(path: Path, function_name: str) -> FunctionType:
    functions = _functions(load_file(path, f"config {str(path)!r}"))
    if function_name not in functions:
        raise UserError(f"no config {function_name!r} in {str(path)!r}.{did_you_mean(function_name, functions)}")
    return functions[function_name]


def search_config(name: str, overrides: list[str] | None = None) -> Config:
    """Resolve a config by name, or as `path/to/file.py:function`, and apply `field=value` overrides.

    Raises:
        UserError: unknown config or field (with the nearest names), wrong type or value.
    """
    file, separator, function_name = name.rpartition(":")
    if separator and (file.endswith(".py") or "/" in file):
        function = _function_from_file(Path(file), function_name)
    else:
        configs = list_configs()
        if name not in configs:
            raise UserError(f"unknown config {name!r}.{did_you_mean(name, configs)} (--list shows all of them)")
        function, function_name = configs[name], name
    try:
        config = function()
    except UserError:
        raise
    except Exception as error:
        path = function.__code__.co_filename
        fields = f". Config fields: {', '.join(config_fields())}" if isinstance(error, TypeError) else ""
        raise UserError(f"config {name} failed in {path}, {describe_failure(error, path)}{fields}") from error
    if not isinstance(config, Config):
        raise UserError(f"config {name} returned {type(config).__name__}, expected llip.configs.Config")
    config = config.replace(**parse_overrides(overrides or []))
    return config if config.name else config.replace(name=function_name)
