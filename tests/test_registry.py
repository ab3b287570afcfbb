"""Poolings and objectives of a user's own, in one file beside the config that names them."""

import pytest
import torch

import llip
from llip.configs import Config, search_config
from llip.errors import UserError
from llip.main import train
from llip.registry import Registry, objectives, poolings
from tests.helpers import write_pairs

EXAMPLE = "examples/own_pooling_and_loss.py:gated"


def test_a_file_of_ones_own_trains_and_loads(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.figures.draw_curves", lambda folder: None)
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
    from llip.training.figures import read_jsonl

    losses = [record["loss"] for record in read_jsonl(config.folder / "metrics.jsonl")]
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
