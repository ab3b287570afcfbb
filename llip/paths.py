"""Paths as users write them: `~`, `$VAR`, and `${VAR:-default}`."""

import os
import re

_WITH_DEFAULT = re.compile(r"\$\{(\w+):-([^}]*)\}")


def expand_path(text: str) -> str:
    """Expand `~`, `$VAR` and `${VAR:-default}` (the shell's form: the default where VAR is unset or empty)."""
    text = _WITH_DEFAULT.sub(lambda match: os.environ.get(match[1]) or match[2], text)
    return os.path.expanduser(os.path.expandvars(text))
