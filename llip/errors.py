"""How the project talks to a user about the user's mistakes.

Every mistake that a user can make ends as a `UserError`: one message that names the thing, the value, what was expected
and the fix. The programs print the message without a traceback and leave with `EXIT_USER`; anything else that is raised
is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_USER = 2
"""Exit code of every program when the user's input (config, command, data, folder) is at fault."""

EXIT_RUN = 3
"""Exit code of a run that went wrong by itself: numbers that are not finite, a process that died or is stuck."""

EXIT_STOPPED = 75
"""Exit code of a training run that was asked to stop and has saved: the same command continues it (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake in what the user asked for. The message stands on its own: no traceback is shown."""

    exit_code = EXIT_USER


class CollectiveUserError(UserError):
    """A mistake that every process of a run knows of: the main one alone tells it."""


class RunError(UserError):
    """A run that cannot go on, by nobody's typing mistake. Told like a `UserError`, with an exit code of its own."""

    exit_code = EXIT_RUN


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
