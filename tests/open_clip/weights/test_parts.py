"""Weights of one tower from files: what timm writes, what others write, and what does not fit."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import llip
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from llip.open_clip.weights.load import load_weights
from tests.helpers import BACKBONE_MODEL

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def source():
    torch.manual_seed(5)
    return timm.create_model("resnet10t").eval()


@pytest.fixture
def write(tmp_path):
    """Write a model json that starts from the given file."""

    def described(weights, **vision):
        vision = BACKBONE_MODEL["vision_cfg"] | vision | ({"timm_weights": weights} if weights else {})
        (tmp_path / "m.json").write_text(json.dumps(BACKBONE_MODEL | {"vision_cfg": vision}))
        return str(tmp_path / "m.json")

    return described


def create(path, **options):
    return llip.create_model_and_transforms(path, **{"pool_heads": 4} | options)[0].eval()


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "layout", ["safetensors", "folder", "state_dict", "wrapped", "of OpenCLIP", "without counters"]
)
@torch.no_grad()
def test_layouts(source, write, tmp_path, layout):
    state = source.state_dict()
    if layout in ("safetensors", "folder"):
        (tmp_path / "folder").mkdir()
        save_file(state, tmp_path / "folder" / "model.safetensors")
        path = "folder" if layout == "folder" else "folder/model.safetensors"
    else:
        files = {
            "state_dict": {"epoch": 3, "state_dict": state},
            "wrapped": {"model": with_prefix(state, "module.")},
            "of OpenCLIP": with_prefix(state, "visual.trunk.") | {"text.other": torch.zeros(1)},
            "without counters": {key: value for key, value in state.items() if "num_batches" not in key},
        }
        path = "weights.pt"
        torch.save(files[layout], tmp_path / path)
    model = create(write(path), mixture_tokens=2)  # the path is relative to the json
    images = torch.randn(2, 3, 64, 64)
    expected = source.forward_features(model.visual.source_pixels(images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.visual.frozen_features(images), expected)
    assert set(model.load_report.unexpected) == {"visual.trunk.fc.weight", "visual.trunk.fc.bias"}
    assert not model.load_report.missing
    assert model.visual.pixel_statistics()[0] == list(source.pretrained_cfg["mean"])


def test_a_restored_model_needs_no_file(source, write, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = create(write("w.pt"), mixture_tokens=2)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    (tmp_path / "w.pt").unlink()
    again = llip.load_pretrained(tmp_path / "c.pt")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert "timm_weights" not in json.dumps(model.config)
    with pytest.raises(UserError, match=r"w\.pt' is not there"):
        create(write("w.pt"))


def test_positions_are_resized_as_timm_does(monkeypatch, write, tmp_path):
    build = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **options: build(name, **options, **VIT))
    source = timm.create_model("vit_tiny_patch16_224").eval()
    torch.nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = create(write("w.pt", timm_model_name="vit_tiny_patch16_224", image_size=96))
    source.set_input_size(96)
    images = torch.randn(2, 3, 96, 96)
    expected = source.forward_features(model.visual.source_pixels(images))
    torch.testing.assert_close(model.visual.frozen_features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "missing visual.trunk.layer1.0.conv1.weight"),
        (lambda state: state.update({"stem.weight": torch.zeros(1)}), "unexpected visual.trunk.stem.weight"),
        (lambda state: state.update({"bn1.weight": torch.zeros(1)}), r"visual.trunk.bn1.weight is \(1,\), expected"),
    ],
)
def test_what_does_not_fit_is_named(source, write, tmp_path, spoil, message):
    state = source.state_dict()
    spoil(state)
    torch.save(dict(state), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        create(write("w.pt"))


def test_another_models_backbone_starts_a_mixture_head(write):
    source, model = create(write(None), mixture_tokens=1), create(write(None), mixture_tokens=3)
    theirs = {key: value for key, value in source.state_dict().items() if not key.startswith(("visual.head.", "pool"))}
    theirs |= {"visual.head.proj.weight": torch.zeros(16, 512), "visual.trunk.fc.weight": torch.zeros(1000, 512)}
    report = load_weights(model, theirs, towers_only=True)  # OpenCLIP's layout of a convolutional CLIP
    assert "the mixture head starts from fresh weights" in report.notes
    loaded = model.state_dict()
    assert all(
        torch.equal(loaded[key], value) for key, value in theirs.items() if "visual.head" not in key and key in loaded
    )
    report = load_weights(model, source.state_dict(), towers_only=True, spread=0.0)
    assert any("latents of the mixture head copied from one" in note for note in report.notes)
    assert torch.equal(model.visual.head.latents, source.visual.head.latents.expand(3, -1))


def test_a_run_starts_from_the_files_and_a_spec_alone_does_not(source, write, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    config = Config(model=write("w.pt"), pool_heads=4)
    started = create_model(model_spec(config), None, config.model)
    assert torch.equal(started.visual.trunk.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    fresh = create_model(model_spec(config))
    assert not torch.equal(fresh.visual.trunk.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
