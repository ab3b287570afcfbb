"""The loss curve of a small run against one that was recorded: what is learned changes only on purpose."""

import json
from pathlib import Path

import pytest

from llip.main import train
from llip.training.checkpoints.records import read_records
from tests.helpers import tiny_run

GOLDEN = Path(__file__).with_name("golden.json")
"""Losses and gradient norms of 20 steps by objective; to record them again, write what `curve` returns."""

# The order of float32 sums depends on the CPU and the version of torch: with and without vector instructions, and on 1
# or 2 threads, these curves differ by up to 7e-7 in a loss and 7e-6 in a gradient norm.
TOLERANCE = 1e-4


def curve(config):
    train(config, "cpu")
    records = read_records(config.folder / "metrics.jsonl")
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm")}


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_loss_curve_is_the_recorded_one(tmp_path, monkeypatch, loss):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    expected = json.loads(GOLDEN.read_text())[loss]
    measured = curve(tiny_run(tmp_path, epochs=10, loss=loss))
    assert len(measured["loss"]) == 20
    for name, values in measured.items():
        assert values == pytest.approx(expected[name], rel=TOLERANCE), name
