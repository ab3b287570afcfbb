"""The images of a folder as they are now, and what has changed since they were last looked at."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from llip.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Names that count as images, in either case; other files are passed over."""


@dataclasses.dataclass(frozen=True)
class FileState:
    """What identifies an unchanged file."""

    size: int  # bytes
    mtime_ns: int


def find_images(folder: Path) -> dict[str, FileState]:
    """Return the images below `folder` by relative path with `/`, sorted; hidden files and folders are passed over.

    Links to files are followed, links to folders are not.

    Raises:
        UserError: `folder` is not there, or a folder below it cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {str(folder)!r} is not there")

    def refuse(error: OSError) -> None:
        raise UserError(f"image folder {str(folder)!r} cannot be listed: {error}") from error

    found: dict[str, FileState] = {}
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(root, name)
            try:
                status = path.stat()
            except OSError:  # a dangling link, or a file that went while we looked
                continue
            found[path.relative_to(folder).as_posix()] = FileState(status.st_size, status.st_mtime_ns)
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Changes:
    """Relative paths, sorted."""

    new: list[str]
    changed: list[str]
    deleted: list[str]

    @property
    def to_encode(self) -> list[str]:
        """What has to be looked at again."""
        return sorted([*self.new, *self.changed])


def compare(before: Mapping[str, FileState], now: Mapping[str, FileState]) -> Changes:
    """Return what changed between two scans of a folder; a file has changed if its size or modification time has."""
    return Changes(
        new=sorted(now.keys() - before.keys()),
        changed=sorted(path for path in now.keys() & before.keys() if now[path] != before[path]),
        deleted=sorted(before.keys() - now.keys()),
    )
