"""A run that is asked to stop: SIGTERM, SIGINT and SIGUSR2 are noted here, and the trainer ends the step and saves."""

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
        """Handle a signal. Ctrl-C a second time leaves at once; a launcher then passes SIGTERM on."""
        if self.signal == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            os.write(2, b"\nstopped at once; the newest checkpoint is what remains\n")
            os._exit(128 + signal.SIGINT)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the signals of `STOP_SIGNALS` while inside, then put back the handlers that were there.

    Outside the main thread, where Python takes no signals, nothing is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
