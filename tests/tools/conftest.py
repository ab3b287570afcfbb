"""What the tests of several tools need."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import TINY_MODEL


@pytest.fixture
def plain_model(tmp_path):
    """Folder of a plain OpenCLIP model with random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "plain"
    folder.mkdir()
    config = {"model_cfg": TINY_MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**TINY_MODEL).state_dict(), folder / "open_clip_model.safetensors")
    return folder
