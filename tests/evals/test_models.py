"""An evaluation accepts every model that can be opened, and gives plain OpenCLIP models OpenCLIP's own accuracy."""

import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from evals import main_mc, mc, scaffold
from evals.models import model_precision
from llip.clipeval.eval_config import EvalConfig
from llip.errors import UserError
from llip.tools.export.__main__ import main as export
from tests.clipeval.fakes import write_catalog, write_imagefolder
from tests.helpers import TINY_MODEL, write_plain_model

ROOT = Path(__file__).parents[2]
CLASSES, PROMPTS = ["ant", "bee", "cow"], ["a photo of a {c}", "one {c}"]


@pytest.fixture
def evaluation(tmp_path: Path) -> EvalConfig:
    """Twelve pictures in three classes, no model yet."""
    write_imagefolder(tmp_path / "pictures", CLASSES, 4)
    entry = {"type": "imagefolder", "path": "pictures", "prompts": PROMPTS, "classnames": "dataset"}
    write_catalog(tmp_path / "catalog.json", {"pictures": entry})
    return EvalConfig(catalog_name=str(tmp_path / "catalog.json"), output_dir=str(tmp_path / "out"), workers=0)


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """An OpenCLIP model of random weights as a local folder."""
    return write_plain_model(tmp_path / "plain", mean=0.4, std=0.3)


@torch.no_grad()
def open_clip_ranks(folder: Path, pictures: Path) -> list[int]:
    """Return the place of each picture's class, by OpenCLIP alone."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    weights = open_clip.build_zero_shot_classifier(
        model, tokenizer, CLASSES, [lambda c, prompt=prompt: prompt.replace("{c}", c) for prompt in PROMPTS],
        num_classes_per_batch=None, device="cpu",
    )  # fmt: skip
    ranks = []
    for label, name in enumerate(CLASSES):
        for path in sorted((pictures / name).iterdir()):
            scores = model.encode_image(preprocess(Image.open(path))[None], normalize=True) @ weights
            ranks.append(scores[0].argsort(descending=True).tolist().index(label))
    return ranks


def test_a_plain_open_clip_folder_has_open_clips_accuracy(evaluation: EvalConfig, plain_folder: Path, tmp_path: Path):
    config = EvalConfig(**{**vars(evaluation), "model": str(plain_folder)})
    assert mc.run(config, ["cpu"]) == 0
    expected = open_clip_ranks(plain_folder, tmp_path / "pictures")
    with np.load(tmp_path / "out" / "per_sample" / "pictures.npz") as stored:
        assert stored["ranks"].tolist() == expected
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["pictures"]["value"] == sum(rank == 0 for rank in expected) / len(expected)
    assert results["model"]["config"] is None
    assert results["model"]["checkpoint"]["path"] == str(plain_folder / "open_clip_model.safetensors")


def test_an_open_clip_model_by_name_and_file(evaluation: EvalConfig, plain_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"Tiny": TINY_MODEL})
    weights = plain_folder / "open_clip_model.safetensors"
    config = EvalConfig(**{**vars(evaluation), "model": "Tiny", "pretrained": str(weights)})
    assert mc.run(config, ["cpu"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"]["config"] == "Tiny"


@pytest.mark.slow
def test_an_exported_model_scores_as_its_checkpoint(tmp_path: Path, monkeypatch):
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_eda9cc8.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    checkpoint = "logs/run/checkpoints/latest.pt"
    assert export([checkpoint, "--out", "exported"]) == 0
    ways = {
        "checkpoint": f"mc_config_name: run.py:run\ncheckpoint_path: {checkpoint}\n",
        "folder": "mc_config_name: run.py:run\ncheckpoint_path: exported\n",
        "safetensors": "mc_config_name: run.py:run\ncheckpoint_path: exported/model.safetensors\n",
        "model": "model: exported\n",
        "model file": f"model: {checkpoint}\n",
    }
    ranks: dict[str, list] = {}
    for way, keys in ways.items():
        common = f"catalog_name: catalog.json\noutput_dir: {way}\nworkers: 0\n"
        Path("way.yaml").write_text(keys + common)
        assert main_mc.main(["--fname", "way.yaml", "--devices", "cpu"]) == 0
        for task in ("classes", "pairs"):
            with np.load(Path(way, "per_sample", f"{task}.npz")) as stored:
                ranks.setdefault(way, []).append((stored["ranks"].tolist(), stored["text_ranks"].tolist()))
    assert len(ranks["checkpoint"][1][0]) == 32
    assert all(each == ranks["checkpoint"] for each in ranks.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("model: ViT-B-16\npretrained: opneai\n", "'opneai' is neither a file nor a tag"),
        ("model: ViT-B-16\n", r"needs weights: give pretrained, a tag or a path \(OpenCLIP's tags: .*openai"),
        ("model: ViT-B-61\npretrained: openai\n", "'ViT-B-61' is neither a path nor an OpenCLIP model.*ViT-B-16"),
        ("model: gone.pt\n", r"'gone\.pt' is not there"),
        ("model: .\n", "holds no weights"),
        (
            "model: a.pt\nmc_config_name: llip_b16\n",
            "mc_config_name = 'llip_b16' does not go with .*; model replaces",
        ),
        ("pretrained: openai\n", "pretrained = 'openai' does not go with .*; give the OpenCLIP model's name as model"),
        ("model: a.pt\nprecision: half\n", "precision = 'half'; expected one of fp32"),
        ("model: $LLIP_TEST_UNSET/a.pt\n", "variable LLIP_TEST_UNSET is not set"),
    ],
)
def test_mistakes(keys: str, message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(f"{keys}output_dir: out\n")
    assert main_mc.main(["--fname", "x.yaml", "--devices", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("out").exists()


def test_a_plain_model_instead_of_a_runs_is_a_mistake(plain_folder: Path, tmp_path: Path, capsys) -> None:
    keys = f"mc_config_name: llip_quickstart\ncheckpoint_path: {plain_folder}\noutput_dir: {tmp_path / 'out'}\n"
    catalog = write_catalog(tmp_path / "catalog.json", {"x": {"type": "imagefolder", "path": "x", "prompts": ["{c}"]}})
    (tmp_path / "x.yaml").write_text(f"{keys}catalog_name: {catalog}\n")
    assert main_mc.main(["--fname", str(tmp_path / "x.yaml"), "--devices", "cpu"]) == 2
    assert "the checkpoint's model is not the config's: " in capsys.readouterr().err


def test_precision(tmp_path: Path):
    plain, own = EvalConfig(model="ViT-B-16"), EvalConfig(mc_config_name="llip_b16_k32")
    assert [model_precision(config, "cuda:0") for config in (plain, own)] == ["fp32", "amp_bf16"]
    assert model_precision(EvalConfig(model="ViT-B-16", precision="amp_fp16"), "cuda:0") == "amp_fp16"
    assert model_precision(own, "cpu") == "fp32"


def test_a_key_given_twice(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("model: a.pt\noutput_dir: out\nreferences:\n  a: 1\n  b: 2\n  a: 3\n")
    with pytest.raises(UserError, match=r"x\.yaml, line 6: key 'a' is given twice"):
        scaffold.load(str(path))
    path.write_text("model: a.pt\nbatch_size: 3\noutput_dir: out\nbatch_size: 4\n")
    with pytest.raises(UserError, match=r"line 4: key 'batch_size' is given twice"):
        scaffold.load(str(path))


def test_results_are_of_the_content_of_a_model(evaluation: EvalConfig, plain_folder: Path, tmp_path: Path, capsys):
    """Moved, a model's results are kept; with another config or tokenizer beside the same weights they are not."""
    moved = tmp_path / "elsewhere" / "moved"
    assert mc.run(replace(evaluation, model=str(plain_folder)), ["cpu"]) == 0
    moved.parent.mkdir()
    plain_folder.rename(moved)
    (moved / "README.md").write_text("words")
    config = replace(evaluation, model=str(moved))
    capsys.readouterr()
    assert mc.run(config, ["cpu"]) == 0
    assert "1 of 1 tasks are done already" in capsys.readouterr().out
    described = json.loads((moved / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["mean"] = [0.6] * 3
    (moved / "open_clip_config.json").write_text(json.dumps(described))
    assert mc.run(config, ["cpu"]) == 0
    assert "earlier results are of another model" in capsys.readouterr().out
    (tmp_path / "out" / "results.previous.json").unlink()
    (moved / "extensions").mkdir()
    (moved / "extensions" / "pooling.py").write_text("")
    assert mc.run(config, ["cpu"]) == 0
    assert "earlier results are of another model" in capsys.readouterr().out
