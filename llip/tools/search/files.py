"""The images of a folder, and what identifies their content."""

import os
from pathlib import Path
from typing import NamedTuple

from llip.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Names that count as images, in either case; other files are ignored."""


class FileState(NamedTuple):
    """Size and time of change: a file with another state is read again."""

    size: int  # bytes
    mtime_ns: int


def find_images(folder: Path) -> dict[str, FileState]:
    """Return the images below `folder` by relative path with `/`, sorted; hidden files and folders are ignored.

    Links to files are followed, links to folders are not.

    Raises:
        UserError: `folder` is not there, or a folder below it cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {str(folder)!r} is not there")

    def refuse(error: OSError) -> None:
        raise UserError(f"image folder {str(folder)!r} cannot be listed: {error}") from error

    images: dict[str, FileState] = {}
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(root, name)
            try:
                status = path.stat()
            except OSError:  # a dangling link, or a file that was just deleted
                continue
            images[path.relative_to(folder).as_posix()] = FileState(status.st_size, status.st_mtime_ns)
    return dict(sorted(images.items()))
