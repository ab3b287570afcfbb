"""Stop requests: on SIGTERM, SIGINT or SIGUSR2 to any process, the trainer finishes the step and saves.

Python runs a signal's handler in the main thread, which a collective may block for long. Another thread therefore reads
the signals that have arrived, and passes the request on to the other processes (see `watchdog`).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from llip.system.exit_with_parent import STOP_SIGNALS


class StopRequest:
    """Whether a process of the run has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the last one that was handled here
        self.requested = False  # by a signal here that may be unhandled yet, or to another process
        self.arrived = bytearray()  # numbers of the signals that `look` has read
        self._reader: int | None = None

    def __bool__(self) -> bool:
        return self.requested or self.signal is not None

    def look(self) -> None:
        """Notice signals that have arrived while the main thread is blocked; for any thread."""
        if self._reader is not None:
            with contextlib.suppress(BlockingIOError):
                numbers = os.read(self._reader, 4096)
                self.arrived += numbers
                self.requested |= any(number in numbers for number in STOP_SIGNALS)

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
    request._reader, writer = os.pipe()
    os.set_blocking(request._reader, False)
    os.set_blocking(writer, False)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        request.look()
        if outer >= 0:
            os.write(outer, request.arrived)
        reader, request._reader = request._reader, None
        os.close(reader)
        os.close(writer)
