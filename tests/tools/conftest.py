"""What the tests of several tools need."""

import pytest

from tests.helpers import write_plain_model


@pytest.fixture
def plain_model(tmp_path):
    """Folder of a plain OpenCLIP model with random weights."""
    return write_plain_model(tmp_path / "plain")
