"""A data worker ends with the process that started it, not with a signal to the run, and takes its commands along."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""What ends a run in good order: a scheduler's and a launcher's way to ask, Ctrl-C, and SLURM's warning."""

_EVERY = 0.1  # seconds between looks at the parent; until then a dead one seems to hold what its workers inherited


def exit_with_parent(cleanups: Sequence[Callable[[], object]] = ()) -> None:
    """Let this process leave when its parent is gone or asks it to by SIGTERM, and at nobody else's request.

    Schedulers and launchers signal every process of a run. The main process then ends what it is at in good order, for
    which it needs its workers; so they, and the commands that they start from here on, do not listen to such signals.

    For a process's main thread, before it starts others.

    Args:
        cleanups: called before the process leaves, from another thread, for instance to kill the commands that it has
            started: they would go on until they next write something. An `OSError` of one does not keep the next from
            being called.
    """
    parent = os.getppid()
    asked = _asked_by(parent)

    def watch() -> None:
        while os.getppid() == parent and not asked(_EVERY):
            pass
        for cleanup in cleanups:
            with contextlib.suppress(OSError):
                cleanup()
        os._exit(0)  # torch takes another code from a worker that it has asked to leave for a failure

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Keep `STOP_SIGNALS` waiting inside, and from the processes forked inside until they call `exit_with_parent`.

    Without it a signal may end a worker in the moment between its fork and that call.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return event.wait
