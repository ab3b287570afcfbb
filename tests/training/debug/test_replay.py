"""The replay of a run with a pooling of the user's own, in a process that has not read the user's file yet."""

import contextlib
import json
import math

import pytest
import torch

from llip.config_search import read_file
from llip.configs import Config
from llip.errors import RunError, UserError
from llip.extensions import objectives, poolings
from llip.main import train
from llip.open_clip.model import Llip
from llip.training.debug import replay
from tests.helpers import write_pairs

OWN = """
from llip.open_clip.pooling import MeanTokens
from llip.extensions import poolings


@poolings.register("replayed")
class Mine(MeanTokens):
    @classmethod
    def build(cls, mixture_tokens, width, heads, temperature):
        return cls(mixture_tokens)
"""


@contextlib.contextmanager
def forgotten_after():
    """What is registered inside is forgotten at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (poolings, objectives):
            for kept in ("_things", "_sources"):
                patch.setattr(registry, kept, dict(getattr(registry, kept)))
        yield


@pytest.fixture
def record(tiny_model, tmp_path, monkeypatch):
    """The flight record of a run whose weights are not finite, with a pooling that this process has forgotten."""
    own = tmp_path / "lab" / "mine.py"
    own.parent.mkdir()
    own.write_text(OWN)
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

    with forgotten_after(), monkeypatch.context() as patch:
        read_file(own)
        config = Config(pooling="replayed", **fields)
        patch.setattr(Llip, "encode_image", poisoned)
        with pytest.raises(RunError):
            train(config, "cpu")
    assert "replayed" not in poolings
    with forgotten_after():
        yield config.folder / "flight" / "step_1", own


def test_the_file_is_named_and_read_again(record, capsys):
    folder, own = record
    assert replay.main([str(folder), "--device", "cpu", "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["reproduced"]
    assert result["read"] == [str(own)]
    assert f"reading {own}, for pooling 'replayed'" in told.err


def test_a_file_that_has_moved_is_asked_for(record, capsys):
    folder, own = record
    moved = own.rename(own.with_name("moved.py"))
    assert replay.main([str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"pooling 'replayed', from {str(own)!r}, which is not there (any more)" in error
    assert "--own path/to/file.py" in error
    assert replay.main([str(folder), "--device", "cpu", "--own", str(moved)]) == 0
    assert "the numbers go wrong again" in capsys.readouterr().out


def test_a_file_that_does_not_help_and_a_record_that_names_none_are_told(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    fields = {"pooling": "text", "loss": "nobody's"}
    with pytest.raises(UserError, match=r"loss \"nobody's\", and .*empty.py does not register it: .*--own"):
        replay.read_own_files({"config": fields, "own_files": [str(empty)]})
    with pytest.raises(UserError, match=r"the record does not tell its file: .*--own"):
        replay.read_own_files({"config": fields})


def test_files_are_left_alone_where_every_name_is_known(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('this was read')")
    fields = {"pooling": "text", "loss": "sigmoid"}
    assert replay.read_own_files({"config": fields, "own_files": [str(trap)]}) == []
