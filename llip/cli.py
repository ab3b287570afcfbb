"""The command line of `python -m llip.main`: which config, with which overrides. Imports no torch."""

import argparse
import dataclasses

from llip.config_search import list_configs, search_config
from llip.configs import Config, config_fields
from llip.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user asked for: a config to act on, or None where the answer has been printed already."""

    config: Config | None
    print_only: bool = False


def _field_help() -> str:
    lines = [f"  {name:20} {field.metadata['meaning']} [{field.default!r}]" for name, field in config_fields().items()]
    return "config fields:\n" + "\n".join(lines)


def _list_text() -> str:
    configs = list_configs()
    width = max(map(len, configs))
    return "\n".join(
        f"{name:{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in configs.items()
    )


def parse_command(arguments: list[str]) -> Command:
    """Read the command line; `--help` prints and exits, `--list` prints.

    Raises:
        UserError: no config, an unknown config or field, or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llip.main",
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
        raise UserError("no config given; --list shows all of them, for instance: python -m llip.main llip_quickstart")
    return Command(search_config(given.config, given.overrides), given.print)
