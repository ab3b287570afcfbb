"""Provenance of a run: code, libraries, data, machine. Part of every checkpoint, and compared on resume."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from llip.system.git import code_commit
from llip.system.processes import Processes

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "numpy", "simplejpeg")
"""Packages whose versions may change results."""
_ROOT = Path(__file__).resolve().parents[3]


def make_provenance(processes: Processes, data_digest: int) -> dict[str, Any]:
    """Return plain values that describe what this process runs on.

    Args:
        processes: of the run.
        data_digest: hash of the shards' names and sizes.
    """
    cuda = processes.device.type == "cuda"
    return {
        "commit": code_commit(_ROOT),
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
