"""A process of a run ends with the launcher that started it, from its first moment on. Imports no torch.

A killed launcher tells nobody. What it has started would go on without it: training into a folder that the next start
wants, or, before all have found each other, waiting for those that will never come.
"""

import os
import threading
import time

from llip.errors import EXIT_RUN

LAUNCHER = "LLIP_LAUNCHER"
"""Process id of our own launcher, which puts it there."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_EVERY = 0.2  # seconds between looks


def exit_with_launcher() -> None:
    """Let this process leave when its launcher is gone; to be called first thing. Without a launcher, do nothing."""
    if LAUNCHER in os.environ:
        launcher = int(os.environ[LAUNCHER])
    elif _TORCHRUN in os.environ:
        launcher = os.getppid()
    else:
        return

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(_EVERY)
        os._exit(EXIT_RUN)  # nobody waits for what we do

    threading.Thread(target=look, name="launcher-watch", daemon=True).start()
