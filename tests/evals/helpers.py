"""A small evaluation with a fake model, which several test files change."""

import json
from pathlib import Path

from llip.clipeval.eval_config import EvalConfig
from tests.clipeval.fakes import FakeModel

CLASSES = ["ant", "bee", "cow"]


def load_fake(config: EvalConfig) -> FakeModel:
    return FakeModel(seed=int(Path(config.checkpoint_path).read_text()))


def results_of(config: EvalConfig) -> dict:
    return json.loads(Path(config.output_dir, "results.json").read_text())
