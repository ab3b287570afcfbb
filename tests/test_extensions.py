"""Poolings and objectives of a user's own, in one file beside the config that names them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llip
from llip.config_search import own_files, read_file, search_config
from llip.configs import Config
from llip.errors import UserError
from llip.extensions import Registry, objectives, poolings
from llip.main import train
from tests.helpers import write_pairs

EXAMPLE = "examples/own_pooling_and_loss.py:gated"


def test_a_file_of_ones_own_trains_and_loads(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    pairs = write_pairs(tmp_path / "pairs", 32, 16)
    changes = {
        "train_data": pairs, "train_num_samples": 32, "caption_keys": "txt", "model": tiny_model, "batch_size": 16,
        "epochs": 20, "eval_steps": 0, "report_to": "none", "workers": 0, "name": "own", "logs": tmp_path, "warmup": 2,
        "log_steps": 1, "save_frequency": 0,
    }  # fmt: skip
    config = search_config(EXAMPLE, [f"{name}={value}" for name, value in changes.items()])
    assert (config.pooling, config.loss) == ("gated", "hinge")
    train(config, "cpu")
    model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt")
    h, t = torch.randn(3, 8, 16), torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    weights = model.mixture_weights(h, t)
    assert weights.shape == (3, 5, 1, 8)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 5, 1))
    torch.testing.assert_close(model.similarity(h, t), torch.einsum("btd,td->bt", model.contextualize(h, t), t))
    from llip.training.checkpoints.records import read_records

    losses = [record["loss"] for record in read_records(config.folder / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"config field pooling = 'txt': expected one of 'first'.*Did you mean 'text'"):
        Config(pooling="txt")
    with pytest.raises(UserError, match=r"config field loss = 'sigmiod'.*Did you mean 'sigmoid'"):
        Config(loss="sigmiod")


def test_a_name_belongs_to_one():
    registry = Registry("thing", {"a": "os:path"})
    import os

    assert registry.find("a") is os.path
    registry.register("b")(dict)
    registry.register("b")(dict)  # the same file read twice
    with pytest.raises(UserError, match="thing 'b' is there already"):
        registry.register("b")(list)
    with pytest.raises(UserError, match="thing 'a' is there already"):
        registry.register("a")(list)
    with pytest.raises(UserError, match=r"unknown thing 'c'.*registers it"):
        registry.find("c")
    assert list(registry) == ["a", "b"]


def test_what_is_shipped_can_be_found():
    assert [poolings.find(name).__name__ for name in ("first", "text")] == ["FirstToken", "TextConditionedPooling"]
    assert objectives.find("softmax").bias is None


REGISTERS = """
from llip.extensions import poolings

@poolings.register("{name}")
class Mine:
    note = "{note}"
"""


@pytest.fixture
def own_names(monkeypatch):
    """What a test registers is forgotten after it."""
    for registry in (poolings, objectives):
        monkeypatch.setattr(registry, "_things", dict(registry._things))
        monkeypatch.setattr(registry, "_sources", dict(registry._sources))


def test_the_file_of_a_name_is_known(tmp_path, own_names, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(REGISTERS.format(name="mine", note="first"))
    monkeypatch.chdir(tmp_path)
    read_file(Path("mine.py"))
    assert own_files(Config(pooling="mine", loss="softmax")) == [file]
    assert own_files(Config(pooling="first", loss="softmax")) == []
    monkeypatch.chdir("/")
    assert poolings.source("mine") == file
    file.unlink()
    with pytest.raises(UserError, match=r"pooling 'mine' was registered in .*mine\.py', which is no file"):
        own_files(Config(pooling="mine"))


def test_a_file_may_be_read_again_by_its_path_and_as_a_module_but_another_file_may_not(
    tmp_path, own_names, monkeypatch
):
    file, other = tmp_path / "mine_again.py", tmp_path / "other.py"
    file.write_text(REGISTERS.format(name="again", note="first"))
    other.write_text(REGISTERS.format(name="again", note="other"))
    read_file(file)
    file.write_text(REGISTERS.format(name="again", note="second"))
    read_file(file)
    assert poolings.find("again").note == "second"
    monkeypatch.syspath_prepend(tmp_path)
    __import__("mine_again")
    copy = tmp_path / "copy.py"
    copy.write_bytes(file.read_bytes())
    read_file(copy)  # as a job's snapshot has it
    with pytest.raises(UserError, match=r"pooling 'again' is there already, from .*copy\.py"):
        read_file(other)


def test_no_torch_is_needed_to_know_the_names():
    code = "import sys, llip.config_search as c; c.search_config('llip_b16'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
