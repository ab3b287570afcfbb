"""A run written before the tree was reorganised (commit eda9cc8) still loads, resumes and evaluates.

`tests/fixtures/run_eda9cc8.tar.xz` holds an interrupted run of that commit (checkpoint of step 5 of 12; words that
never occur have zero embeddings, so that it is small), its shards, and `expected.json`: the losses of the uninterrupted
run, and that commit's evaluation and scores of the checkpoint.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

import llip
from evals import main_mc
from llip.main import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_eda9cc8.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch) -> dict:
    """Unpack the old run into an empty current folder; return what its own commit measured."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    return json.loads(Path("expected.json").read_text())


def test_loads(old):
    model = llip.load_pretrained("logs/run/checkpoints/latest.pt").eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["red green picture", "a picture", "blue small picture"])
    with torch.no_grad():
        scores = model.similarity(model.encode_image(images), model.encode_text(tokens))
    torch.testing.assert_close(scores, torch.tensor(old["similarity"]), rtol=1e-4, atol=1e-5)


def test_resumes(old, capsys):
    assert main(["run.py:run", "name=run"]) == 0
    assert "resumed at step 5 of 12" in capsys.readouterr().err
    losses = [json.loads(line)["loss"] for line in Path("logs/run/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(old["losses"], rel=1e-3)


def test_evaluates(old):
    assert main_mc.main(["--fname", "mc.yaml", "--devices", "cpu"]) == 0
    results = json.loads(Path("results/results.json").read_text())["tasks"]
    assert results.keys() == old["tasks"].keys()
    for task, values in old["tasks"].items():
        assert {key: results[task][key] for key in values} == values
