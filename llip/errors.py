"""Errors as part of the interface: a user's mistake is one message.

A user's mistake ends as a `UserError`: one message that names the thing, the value, what was expected and the fix.
Programs print it without a traceback and exit with its code; any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_USER = 2
"""Exit code of every program for a mistake in the user's input (config, command, data, folder)."""

_SHOWN = 80  # characters of a value

EXIT_RUN = 3
"""Exit code of a run that failed: non-finite numbers, a process that died or is stuck."""

EXIT_STOPPED = 75
"""Exit code of a training run that was asked to stop and has saved: the same command continues it (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake in the user's request; its message is shown without a traceback."""

    exit_code = EXIT_USER

    def __init__(self, message: str, on_all_ranks: bool = False) -> None:
        """Describe the mistake; one that every process of a run raises is printed by the main process alone."""
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class CollectiveUserError(UserError):
    """A mistake raised on every process of a run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, on_all_ranks=True)


class RunError(UserError):
    """A run that failed; printed like a user's mistake, with another exit code."""

    exit_code = EXIT_RUN


def shown(value: object) -> str:
    """Return a value for a message: text in quotes, long values cut."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `choices` most similar to `name`, best first; none if none is close."""
    folded = {choice.lower(): choice for choice in choices}
    return [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=count, cutoff=0.5)]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a ' Did you mean ...?' sentence for an unknown `name`, or the choices if none is similar."""
    choices = list(choices)
    close = nearest(name, choices)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f" Choices: {shown}." if choices else ""
