"""Starts a real Slurm for these tests and takes it down; where it cannot be had, they are skipped with the reason."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("one_node.sh")
CANNOT = 3  # the script's exit code when this machine cannot have it
WANTED = "LLIP_TEST_SLURM"  # set to 1 on a machine of one's own; CI=true does it too


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster of one node."""
    work = tmp_path_factory.mktemp("slurm")
    flag = ["--yes"] if os.environ.get(WANTED) == "1" else []
    up = subprocess.run([SCRIPT, "up", work, *flag], capture_output=True, text=True, timeout=600, check=False)
    if up.returncode == CANNOT:
        pytest.skip(up.stderr.strip().splitlines()[-1] + f" ({WANTED}=1 stands for --yes)" * (not flag))
    assert up.returncode == 0, up.stderr
    configuration = work / "etc" / "slurm.conf"
    try:
        yield Cluster(configuration)
    finally:
        down = subprocess.run([SCRIPT, "down", work], capture_output=True, text=True, timeout=120, check=False)
    assert down.returncode == 0, down.stderr
    assert _processes_of(configuration) == []


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project that a test may edit."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("llip", "evals"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "submitit_openclip.py", folder)
    return folder


def _processes_of(configuration: Path) -> list[str]:
    """Return the command lines of the processes that belong to the cluster, or to one of its jobs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"SLURM_CONF={configuration}".encode() in environment or str(configuration.parents[1]) in command:
            found.append(command)
    return found
