"""Paths as users write them, in configs, catalogs and evaluation files: `~`, `$VAR`, `${VAR}` and `${VAR:-default}`."""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|(?P<plain>\w+))")


def expand_variables(text: str) -> str:
    """Replace variables and a leading `~` in `text`; a variable that is not set and has no default stays as written."""

    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match["braced"] or match["plain"], "")
        return value or (match[0] if match["default"] is None else match["default"])

    return os.path.expanduser(_VARIABLE.sub(value_of, text))


def expand_path(text: str, base: Path | None = None) -> Path:
    """Return the path that `text` means.

    A relative path belongs to `base` (the folder of the file that names it), or to the current folder when it starts
    with a variable, as a shell would read it; without `base`, always to the current folder.
    """
    path = Path(expand_variables(text))
    if base is None or text.startswith("$"):
        return Path.cwd() / path
    return base / path


def unset_variables(text: str | Path) -> list[str]:
    """Return the names of the variables in an expanded path: those that are not set."""
    return [match["braced"] or match["plain"] for match in _VARIABLE.finditer(str(text))]


def is_below(name: str) -> bool:
    """Return whether the relative path `name` leads below a folder: not to the folder itself, nor out of it."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and name[0] != "~" and "\0" not in name
