"""Checkpoint files: complete or absent, loadable without executing code, verified before they replace older ones."""

import contextlib
import logging
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from llip.errors import UserError
from llip.open_clip.weights.load import read_checkpoint
from llip.system.files import atomic_write, flush_to_disk

log = logging.getLogger(__name__)

FORMAT = 1

_FOLDER = 0x10  # bit that no zip entry of a checkpoint has; where it is set, torch returns uninitialised memory


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int, forever: int = 0) -> float:
    """Write and verify `step_<N>.pt`, point `latest.pt` at it, and only then remove older ones.

    Args:
        folder: of the run's checkpoints.
        step: number of the step.
        content: plain tensors and containers.
        keep: number of newest checkpoints to keep; 0 keeps all.
        forever: keep every multiple of this number of steps beside them; 0: none.

    Returns:
        Seconds taken.

    Raises:
        UserError: the disk cannot take it, or does not return what was written.
    """
    started = time.perf_counter()
    target = folder / f"step_{step}.pt"
    try:
        for partial in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            with contextlib.suppress(OSError):
                partial.unlink()
        with atomic_write(target, flush=True) as temporary:
            save_tensors({"format": FORMAT, **content}, temporary)
            verify(temporary)
        with atomic_write(folder / "latest.pt", flush=True) as temporary:
            try:
                os.link(target, temporary)  # a second name for the same bytes
            except OSError:  # file systems without hard links
                shutil.copyfile(target, temporary)
        flush_to_disk(folder)
    except OSError as error:
        raise UserError(f"checkpoint {target} cannot be written: {error.strerror or error}") from error
    if keep:
        _remove_old(folder, keep, forever)
    return time.perf_counter() - started


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """Write tensors and containers with `torch.save`.

    Raises:
        OSError: the disk cannot take the file; torch itself would raise a RuntimeError about an "unexpected pos".
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error


def _remove_old(folder: Path, keep: int, forever: int) -> None:
    """Remove all but the newest; a failure is a warning, since the new checkpoint is safe and other processes wait."""
    for path in list_checkpoints(folder)[keep:]:
        if not forever or int(path.stem.removeprefix("step_")) % forever:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("an old checkpoint cannot be removed and uses disk space: %s", error)


def verify(path: Path) -> None:
    """Check every entry of a checkpoint file against its checksum, which loading does not do.

    Raises:
        UserError: the file is truncated or corrupted.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            folders = [item.filename for item in file.infolist() if item.external_attr & _FOLDER]
    except Exception as error:  # zipfile raises nearly anything on damaged bytes: decoding errors, NotImplementedError,
        # a request for a password, a negative seek
        reason = str(error) or type(error).__name__
        raise UserError(f"checkpoint {str(path)!r} is damaged: {reason}") from error
    if damaged is not None:
        raise UserError(f"checkpoint {str(path)!r} is damaged: wrong checksum of entry {damaged!r}")
    if folders:
        raise UserError(f"checkpoint {str(path)!r} is damaged: entry {folders[0]!r} is marked as a folder")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the `step_<N>.pt` files of `folder`, newest first."""
    checkpoints = {
        int(match[1]): path for path in folder.glob("step_*.pt") if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    return [checkpoints[step] for step in sorted(checkpoints, reverse=True)]


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return (path, content, a warning for each damaged file that is skipped), or None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints and none of them can be read.
    """
    rejected: list[str] = []
    candidates = list_checkpoints(folder)
    if not candidates and (folder / "latest.pt").exists():
        candidates = [folder / "latest.pt"]
    for path in candidates:
        try:
            verify(path)
            content = read_checkpoint(path)
            if content.get("format") != FORMAT:
                raise UserError(f"checkpoint {str(path)!r} has format {content.get('format')!r}, expected {FORMAT}")
        except UserError as error:
            rejected.append(str(error))
            continue
        except OSError as error:  # a disk that fails between verifying and reading
            rejected.append(f"checkpoint {str(path)!r} cannot be read: {error}")
            continue
        return path, content, rejected
    if rejected:
        raise UserError("no checkpoint of the run can be read: " + "; ".join(rejected) + ". Remove them to start over")
    return None
