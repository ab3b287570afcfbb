"""Fixtures of the whole suite."""

import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forked import FORKSERVER, ForkedProgram, start_server
from tests.helpers import ProcessPool, tiny_model_file

if not Path("/dev/nvidiactl").exists():  # no GPU
    # Kernels are tested in Triton's interpreter; it must be known before torchvision and others import triton.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: threads that wait for one another on shared cores take many times as long.
    os.environ |= {"LLIP_CORES": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def pool() -> ProcessPool:
    """Groups of gloo processes that share one import of torch and open_clip."""
    return ProcessPool()


@pytest.fixture
def forked(monkeypatch) -> None:
    """Fork the Python programs that the test starts (see `ForkedProgram`), and what it would spawn."""
    get_context = multiprocessing.get_context

    def context(method: str | None = None) -> Any:
        if method != "spawn":
            return get_context(method)
        start_server()
        return FORKSERVER

    monkeypatch.setattr(multiprocessing, "get_context", context)
    monkeypatch.setattr(subprocess, "Popen", ForkedProgram)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Path of a tiny architecture in OpenCLIP's format."""
    return tiny_model_file(tmp_path_factory.mktemp("model"))


LONG = ("test_survival.py", "test_slurm.py", "test_matrix.py", "test_engine.py")
"""Files that take minutes: begun first, so that no process is left alone with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
