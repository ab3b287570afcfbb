"""A small embedded dataset, made once; tests only read it."""

from pathlib import Path

import pytest

from llip.scenes import write_scenes
from tests.scenes.helpers import SIZE


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of 150 training scenes and 96 of each evaluation set."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=150, test=96, seed=0, image_size=SIZE)
