"""Exit with the parent process: a killed launcher cannot stop its children, so they must notice. Imports no torch."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that request a clean stop: from a scheduler or launcher, by Ctrl-C, and SLURM's warning."""

_INTERVAL = 0.1  # seconds between checks of the parent; a dead one seems to hold its locks as long as its workers live


def exit_with_parent(parent: int, code: int) -> None:
    """Exit with `code`, from a thread, as soon as process `parent` is no longer this process's parent."""
    threading.Thread(target=_exit_after, args=(parent, _sleep, (), code), name="exit-with-parent", daemon=True).start()


def serve_parent(cleanups: Sequence[Callable[[], object]] = ()) -> None:
    """Make this process a worker: it exits when its parent exits or sends SIGTERM, and ignores other `STOP_SIGNALS`.

    Schedulers and launchers signal every process of a run. The main process needs its workers to stop cleanly, so the
    workers, and the commands that they start later, must not react.

    Call it from a process's main thread, before other threads start.

    Args:
        cleanups: called from another thread before the process exits, for instance to kill commands that it has
            started. An `OSError` of one does not skip the others.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # in all threads: only the one below takes them
    arguments = (os.getppid(), _wait_for_sigterm, cleanups, 0)  # torch reports a worker that it terminated unless 0
    threading.Thread(target=_exit_after, args=arguments, name="exit-with-parent", daemon=True).start()


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Block `STOP_SIGNALS` inside the block, and in processes forked inside it until they call `serve_parent`.

    Without it a signal may end a worker between its fork and that call.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_after(parent: int, stop: Callable[[int], bool], cleanups: Sequence[Callable[[], object]], code: int) -> None:
    while os.getppid() == parent and not stop(parent):
        pass
    for cleanup in cleanups:
        with contextlib.suppress(OSError):
            cleanup()
    os._exit(code)


def _sleep(_: int) -> bool:
    time.sleep(_INTERVAL)
    return False


def _wait_for_sigterm(parent: int) -> bool:
    """Wait for a moment, and return whether `parent` sent SIGTERM; the signals must be blocked."""
    if hasattr(signal, "sigtimedwait"):
        received = signal.sigtimedwait(STOP_SIGNALS, _INTERVAL)
        return received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent
    time.sleep(_INTERVAL)  # macOS does not report the sender
    return signal.SIGTERM in signal.sigpending()
