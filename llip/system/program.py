"""How all command-line programs start and fail."""

import functools
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llip.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn `main(arguments, ...)` into a program: `main()` reads the command line, and errors become messages.

    A `UserError` is printed to standard error without a traceback and its exit code is returned; anything else that is
    raised is a bug and keeps its traceback. A `main` that returns None has succeeded.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None, *more: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        try:
            return main(sys.argv[1:] if arguments is None else list(arguments), *more) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED

    return run
