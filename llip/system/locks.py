"""File locks that the operating system releases when their process dies, however it dies."""

import contextlib
import errno
import fcntl
import time
from pathlib import Path
from typing import IO, Any

_BUSY = (errno.EAGAIN, errno.EACCES)  # flock's errors where another process holds the lock


def try_lock(file: IO[Any], patience: float) -> bool:
    """Lock an open file, waiting up to `patience` seconds for another process; return whether it is locked.

    Raises:
        OSError: the file system does not support locks.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def file_system(folder: Path) -> str:
    """Return the kind and mount point of the file system that holds a folder, where Linux reports them."""
    name, longest = "a file system of unknown kind", 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
            _, place, kind, *_ = line.split()
            mount = Path(place.replace("\\040", " "))
            if folder.resolve().is_relative_to(mount) and len(mount.parts) >= longest:
                name, longest = f"{kind} at {mount}", len(mount.parts)
    return name
