"""File locks, which the operating system releases when their process dies."""

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llip.errors import UserError

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


@contextlib.contextmanager
def held_lock(path: Path, what: str, fix: str, patience: float) -> Iterator[None]:
    """Hold the lock file `path`, which names its holder, inside the block.

    Args:
        path: the file, created where it is missing.
        what: the locked thing, in messages.
        fix: how to choose another one, in messages.
        patience: seconds to wait for another process.

    Raises:
        UserError: the file cannot be written, its file system has no locks, or another process holds it.
    """
    try:
        lock = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by the block below
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error}; {fix}") from error
    with lock:
        try:
            free = try_lock(lock, patience)
        except OSError as error:
            raise UserError(
                f"{what} cannot be locked: {error}. It lies on {file_system(path.parent)}, which must support file "
                f"locks: mount it with them (Lustre: flock; NFS: without nolock), or {fix}"
            ) from error
        if not free:
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "another process"
            raise UserError(f"{what} is in use by {holder}; wait for it, or {fix}")
        with contextlib.suppress(OSError):  # on a full disk, the message to others lacks the name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


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
