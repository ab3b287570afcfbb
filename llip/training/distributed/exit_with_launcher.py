"""End a process of a run with the launcher that started it, from its first moment on. Imports no torch.

Otherwise a killed launcher leaves its processes training into a folder that the next start wants, or waiting to join
processes that will never come.
"""

import os

from llip.errors import EXIT_RUN
from llip.system.exit_with_parent import exit_with_parent

LAUNCHER = "LLIP_LAUNCHER"
"""Environment variable: process id of our own launcher, which sets it."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"


def exit_with_launcher() -> None:
    """Exit when the launcher is gone; call it first. Without a launcher, do nothing."""
    if LAUNCHER in os.environ:
        exit_with_parent(int(os.environ[LAUNCHER]), EXIT_RUN)
    elif _TORCHRUN in os.environ:
        exit_with_parent(os.getppid(), EXIT_RUN)
