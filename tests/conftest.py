"""Fixtures of the whole suite."""

import os

import pytest

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER and hasattr(os, "sched_setaffinity"):
    # A core for each of pytest's processes and all that it starts: threads that wait for one another on shared cores
    # take many times as long. Before torch is imported, which counts the cores.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_WORKER.removeprefix("gw")) % len(_cores)]})

from tests.helpers import ProcessPool, tiny_model_file  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> ProcessPool:
    """Groups of gloo processes that share one import of torch and open_clip."""
    return ProcessPool()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Path of a tiny architecture in OpenCLIP's format."""
    return tiny_model_file(tmp_path_factory.mktemp("model"))
