"""Fixtures of the whole suite."""

import pytest

from tests.helpers import ProcessPool, tiny_model_file


@pytest.fixture(scope="session")
def pool() -> ProcessPool:
    """Groups of gloo processes that share one import of torch and open_clip."""
    return ProcessPool()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Path of a tiny architecture in OpenCLIP's format."""
    return tiny_model_file(tmp_path_factory.mktemp("model"))
