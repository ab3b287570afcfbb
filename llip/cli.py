"""The command line of `llip train` and `python -m llip.main`: a config and overrides. Imports no torch."""

import argparse
import dataclasses
import textwrap
from collections.abc import Sequence

from llip.config_search import list_configs, search_config
from llip.configs import FIELD_GROUPS, Config, config_fields
from llip.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """The resolved config, or None if `--list` has been answered."""

    config: Config | None
    print_only: bool = False


def _field_help() -> str:
    """Return the fields in groups, each with its meaning and its default."""
    lines = ["config fields [default]:"]
    for name, field in config_fields().items():
        if name in FIELD_GROUPS:
            lines += ["", FIELD_GROUPS[name]]
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        if default in ("", "None", "True", "False"):
            default = default.lower() or "none" * isinstance(field.default, tuple)
        text = f"{field.metadata['meaning']} [{default}]"
        lines.append(textwrap.fill(text, 110, initial_indent=f"  {name:20} ", subsequent_indent=" " * 23))
    return "\n".join(lines)


def _list_text() -> str:
    configs = list_configs()
    width = max(map(len, configs))
    return "\n".join(
        f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in configs.items()
    )


def parse_command(arguments: Sequence[str]) -> Command:
    """Read the command line; `--help` prints and exits, `--list` prints.

    Raises:
        UserError: no config, an unknown config or field, or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(
        prog="llip train",
        description="Train a config: a function's name in llip/run_configs, or path/to/file.py:function.",
        epilog=_field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="the experiment; --list shows all")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument("--list", action="store_true", help="show every config and exit")
    parser.add_argument("--print", action="store_true", help="write the resolved config as YAML and exit")
    given = parser.parse_intermixed_args(arguments)
    if given.list:
        print(_list_text())
        return Command(None)
    if given.config is None:
        raise UserError("no config given; --list shows all of them, for instance: llip train llip_quickstart")
    return Command(search_config(given.config, given.overrides), given.print)
