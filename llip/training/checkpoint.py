"""Checkpoints on disk: never torn, loadable without executing anything, and found again after a crash."""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from llip.errors import UserError
from llip.open_clip.weights import read_checkpoint

FORMAT = 1


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> float:
    """Write `step_<N>.pt`, point `latest.pt` at it, and remove all but the newest `keep` (0 keeps all).

    The file is written beside its place, flushed and renamed, so neither name ever shows half a checkpoint.

    Returns:
        Seconds taken.

    Raises:
        UserError: the disk does not take it.
    """
    started = time.perf_counter()
    target, temporary = folder / f"step_{step}.pt", folder / "writing.tmp"
    try:
        torch.save({"format": FORMAT, **content}, temporary)
        _flush(temporary)
        os.replace(temporary, target)
        link = folder / "latest.tmp"
        link.unlink(missing_ok=True)
        try:
            os.link(target, link)  # a second name for the same bytes
        except OSError:  # file systems without hard links
            shutil.copyfile(target, link)
            _flush(link)
        os.replace(link, folder / "latest.pt")
        _flush(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"checkpoint {target} cannot be written: {error}") from error
    if keep:
        for path in list_checkpoints(folder)[keep:]:
            path.unlink(missing_ok=True)
    return time.perf_counter() - started


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
            content = read_checkpoint(path)
            if content.get("format") != FORMAT:
                raise UserError(f"checkpoint {str(path)!r} has format {content.get('format')!r}, expected {FORMAT}")
        except UserError as error:
            rejected.append(str(error))
            continue
        return path, content, rejected
    if rejected:
        raise UserError("no checkpoint of the run can be read: " + "; ".join(rejected) + ". Remove them to start anew")
    return None
