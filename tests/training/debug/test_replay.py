"""The replay of a run with a pooling from a user's file."""

import json
import math

import pytest
import torch

from llip.configs import Config
from llip.errors import RunError
from llip.main import train
from llip.open_clip.model import Llip
from llip.training.debug import replay
from tests.helpers import write_pairs

POOLING = """
from llip.open_clip.pooling import MeanTokens


class Mine(MeanTokens):
    @classmethod
    def build(cls, mixture_tokens, width, heads, temperature):
        return cls(mixture_tokens)
"""


@pytest.fixture
def record(tiny_model, tmp_path, monkeypatch):
    """The nan dump of a run whose weights are not finite, with a pooling from a file."""
    own = tmp_path / "lab" / "mine.py"
    own.parent.mkdir()
    own.write_text(POOLING)
    fields = {
        "name": "run", "logs": str(tmp_path), "train_data": write_pairs(tmp_path / "pairs", 16, 16),
        "train_num_samples": 16, "model": tiny_model, "mixture_tokens": 4, "batch_size": 16, "epochs": 1, "warmup": 2,
        "precision": "fp32", "workers": 0, "log_steps": 1, "save_frequency": 0, "report_to": (), "max_bad_steps": 1,
    }  # fmt: skip
    encode = Llip.encode_image

    def poisoned(self, images):
        with torch.no_grad():
            self.visual.ln_post.weight[0] = math.nan
        return encode(self, images)

    with monkeypatch.context() as patch:
        config = Config(pooling=f"{own}:Mine", **fields)
        patch.setattr(Llip, "encode_image", poisoned)
        with pytest.raises(RunError):
            train(config, "cpu")
    return config.folder / "nan_dumps" / "step_1", own


def test_the_pooling_is_found(record, capsys):
    folder, _ = record
    assert replay.main([str(folder), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reproduced"]


def test_the_runs_copy_serves_where_the_file_is_gone(record, capsys):
    folder, own = record
    own.unlink()
    assert replay.main([str(folder), "--device", "cpu"]) == 0
    assert "\nnot finite again\n" in capsys.readouterr().out
    (folder.parent.parent / "extensions" / "mine.py").unlink()
    assert replay.main([str(folder), "--device", "cpu"]) == 2
    assert f"there is no file {str(own)!r}" in capsys.readouterr().err
