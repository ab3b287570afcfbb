"""Stop requests: on SIGTERM, SIGINT or SIGUSR2 the trainer finishes the step and saves."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from llip.system.exit_with_parent import STOP_SIGNALS


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal. A second Ctrl-C exits at once; a launcher then passes SIGTERM on."""
        if self.signal == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            os.write(2, b"\nstopped at once; the newest checkpoint remains\n")
            os._exit(128 + signal.SIGINT)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle `STOP_SIGNALS` inside the block, then restore the previous handlers.

    Outside the main thread, where Python receives no signals, there is never a request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
