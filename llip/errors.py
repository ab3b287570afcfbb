"""How the project talks to a user about the user's mistakes.

Every mistake that a user can make ends as a `UserError`: one message that names the thing, the value, what was expected
and the fix. The programs print the message without a traceback and leave with `EXIT_USER`; anything else that is raised
is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_USER = 2
"""Exit code of every program when the user's input (config, command, data, folder) is at fault."""


class UserError(Exception):
    """A mistake in what the user asked for. The message stands on its own: no traceback is shown."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `choices` that look most like `name`, best first; empty when none is close."""
    folded = {choice.lower(): choice for choice in choices}
    return [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=count, cutoff=0.5)]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a ' Did you mean ...?' sentence for an unknown `name`, or the choices when none is near."""
    choices = list(choices)
    close = nearest(name, choices)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f" Choices: {shown}." if choices else ""
