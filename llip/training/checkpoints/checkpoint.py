"""Checkpoints on disk: never torn, loadable without executing anything, and found again after a crash."""

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

log = logging.getLogger(__name__)

FORMAT = 1

_FOLDER = 0x10  # bit of a zip entry that no part has, and for which torch gives memory as it is instead of the part


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int, forever: int = 0) -> float:
    """Write `step_<N>.pt`, read it back, point `latest.pt` at it, and only then remove older ones.

    The file is written beside its place, flushed, verified and renamed: neither name ever shows half a checkpoint, and
    the one before stays until this one is known to be good.

    Args:
        folder: of the run's checkpoints.
        step: that it belongs to.
        content: plain tensors and containers.
        keep: how many of the newest are kept; 0 keeps all.
        forever: steps of which every multiple is kept beside them; 0: none.

    Returns:
        Seconds taken.

    Raises:
        UserError: the disk does not take it, or does not give back what was written.
    """
    started = time.perf_counter()
    target, temporary, link = folder / f"step_{step}.pt", folder / "writing.tmp", folder / "latest.tmp"
    try:
        torch.save({"format": FORMAT, **content}, temporary)
        _flush(temporary)
        verify(temporary)
        os.replace(temporary, target)
        link.unlink(missing_ok=True)
        try:
            os.link(target, link)  # a second name for the same bytes
        except OSError:  # file systems without hard links
            shutil.copyfile(target, link)
            _flush(link)
        os.replace(link, folder / "latest.pt")
        _flush(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        for path in (temporary, link):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise UserError(f"checkpoint {target} cannot be written: {error}") from error
    if keep:
        _remove_old(folder, keep, forever)
    return time.perf_counter() - started


def _remove_old(folder: Path, keep: int, forever: int) -> None:
    """Remove all but the newest; one that stays is a warning: the new checkpoint is safe, and others wait for us."""
    for path in list_checkpoints(folder)[keep:]:
        if not forever or int(path.stem.removeprefix("step_")) % forever:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("an old checkpoint cannot be removed and takes its room: %s", error)


def verify(path: Path) -> None:
    """Compare every part of a checkpoint file with its checksum, which loading does not do.

    Raises:
        UserError: the file is cut off, or some of its bits are not those that were written.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            folders = [item.filename for item in file.infolist() if item.external_attr & _FOLDER]
    except Exception as error:  # damaged bytes make zipfile raise nearly anything: a name that is no UTF-8, a method
        # that does not exist, a password that is asked for, a place before the file's start
        reason = str(error) or type(error).__name__
        raise UserError(f"checkpoint {str(path)!r} is damaged: {reason}") from error
    if damaged is not None:
        raise UserError(f"checkpoint {str(path)!r} is damaged: the checksum of its part {damaged!r} does not fit")
    if folders:
        raise UserError(f"checkpoint {str(path)!r} is damaged: its part {folders[0]!r} is marked as a folder")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the `step_<N>.pt` files of `folder`, newest first."""
    found = {
        int(match[1]): path for path in folder.glob("step_*.pt") if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return (path, content, a warning for each damaged file passed over), or None where there is no checkpoint.

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
        except OSError as error:  # a disk that fails between one look and the next
            rejected.append(f"checkpoint {str(path)!r} cannot be read: {error}")
            continue
        return path, content, rejected
    if rejected:
        raise UserError("no checkpoint of the run can be read: " + "; ".join(rejected) + ". Remove them to start anew")
    return None
