"""A small evaluation with a fake model."""

from pathlib import Path

import pytest

from llip.clipeval.eval_config import EvalConfig
from tests.clipeval.fakes import write_catalog, write_retrieval, write_wds
from tests.evals.helpers import CLASSES


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    """Two good tasks, a checkpoint, and an output folder."""
    write_wds(tmp_path / "wds", [i % 3 for i in range(30)], CLASSES)
    write_retrieval(tmp_path / "pairs", 6)
    entries = {"wds": {"type": "webdataset", "path": "wds"}, "pairs": {"type": "retrieval", "path": "pairs"}}
    write_catalog(tmp_path / "catalog.json", entries)
    (tmp_path / "model.pt").write_text("0")
    return EvalConfig(
        mc_config_name="llip_quickstart",
        checkpoint_path=str(tmp_path / "model.pt"),
        output_dir=str(tmp_path / "out"),
        catalog_name=str(tmp_path / "catalog.json"),
        workers=0,
    )
