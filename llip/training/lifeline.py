"""A data worker ends with the process that started it, and takes along the commands that it has started."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence

from llip.training.read_ahead import ReadWatch
from llip.training.signals import STOP_SIGNALS

_EVERY = 0.1  # seconds between looks at the parent; until then a dead one seems to hold what its workers inherited


def end_with_parent(watches: Sequence[ReadWatch]) -> None:
    """Let this process leave when its parent is gone or asks it to by SIGTERM, and at nobody else's request.

    Schedulers and launchers signal every process of a run. The training process then ends its step and saves, for which
    it needs its workers; so they, and the commands that they start from here on, do not listen to such signals.

    The commands that `watches` know are killed first: a process that is gone cannot do so, and they would go on until
    they next write something. For a process's main thread, before it starts others.
    """
    parent = os.getppid()
    asked = _asked_by(parent)

    def watch() -> None:
        while os.getppid() == parent and not asked(_EVERY):
            pass
        for each in watches:
            with contextlib.suppress(OSError):
                each.interrupt()
        os._exit(0)  # torch takes another code from a worker that it has asked to leave for a failure

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _asked_by(parent: int) -> Callable[[float], bool]:
    """Return what waits some seconds for a SIGTERM from `parent` (torch ends a worker so that does not leave)."""
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # everywhere: the thread alone takes them

        def asked(seconds: float) -> bool:
            taken = signal.sigtimedwait(STOP_SIGNALS, seconds)
            return taken is not None and taken.si_signo == signal.SIGTERM and taken.si_pid == parent

        return asked
    for number in STOP_SIGNALS:  # macOS does not tell who sends a signal
        signal.signal(number, signal.SIG_IGN)
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event.wait
