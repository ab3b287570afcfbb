"""A data worker ends with the process that started it, and takes along the commands that it has started."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence

from llip.training.read_ahead import ReadWatch

_EVERY = 0.1  # seconds between looks at the parent; until then a dead one seems to hold what its workers inherited


def end_with_parent(watches: Sequence[ReadWatch]) -> None:
    """Let this process leave when its parent is gone, or when it is asked to by SIGTERM.

    The commands that `watches` know are killed first: a process that is gone cannot do so, and they would go on until
    they next write something. For a process's main thread.
    """
    parent, asked = os.getppid(), False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True  # no more in a signal handler: the thread it interrupts may hold any lock

    def watch() -> None:
        while not asked and os.getppid() == parent:
            time.sleep(_EVERY)
        for each in watches:
            with contextlib.suppress(OSError):
                each.interrupt()
        os._exit(0)  # torch takes another code from a worker that it has asked to leave for a failure

    signal.signal(signal.SIGTERM, ask)
    threading.Thread(target=watch, name="lifeline", daemon=True).start()
