"""Atomic writes: a file or a folder is written under a temporary name, then renamed."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces it when the block ends and is removed if the block fails.

    Args:
        path: of the file that appears, or changes, at once.
        flush: write the bytes to the disk before the rename, so that a power failure leaves the old or the new file.

    Raises:
        OSError: the disk cannot take the file; names `path`.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write names no file, or the temporary one
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its name when the block ends and is removed if the block fails.

    Raises:
        OSError: the disk cannot take it, or `path` is a folder with files in it, such as another process may have made.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # several processes may write `path`


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; a file that holds the text already is not written, which a full disk permits.

    Raises:
        OSError: the disk cannot take the file; names `path`.
    """
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        OSError: the disk cannot take the file; names `path`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
