"""Under what a run is trained: code, libraries, data, machine. In every checkpoint, and compared when a run goes on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from llip.system.processes import Processes

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "numpy", "simplejpeg")
"""Whose versions may change results."""
COMMIT_FILE = "COMMIT"
"""Beside the package in a snapshot of the code: the commit that it was taken from."""


def make_provenance(processes: Processes, data_digest: int) -> dict[str, Any]:
    """Return plain values that describe this run's circumstances on this process.

    Args:
        processes: of the run.
        data_digest: a number that stands for the shards and what is known of them.
    """
    cuda = processes.device.type == "cuda"
    return {
        "commit": code_commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(processes.device) if cuda else platform.machine(),
        "processes": processes.world_size,
        "host": platform.node(),
        "data": f"{data_digest:08x}",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_commit() -> str | None:
    """Return the commit of the code that runs, `+changes` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parents[3]
    if (folder / COMMIT_FILE).is_file():
        return (folder / COMMIT_FILE).read_text().strip() or None
    try:
        _git(folder, "ls-files", "--error-unmatch", "llip/__init__.py")  # not somebody else's checkout around us
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `name: before -> now` for each entry that has changed."""
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
