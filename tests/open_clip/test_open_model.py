"""One function opens every model: checkpoints, exports, and plain OpenCLIP models, whose scores are OpenCLIP's own."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.plain import PlainImageTower
from llip.tools.export.__main__ import export
from tests.helpers import TINY_MODEL

PICTURE = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 20).convert("RGB")
TEXTS = ["a cat", "two dogs here", "nothing"]


@pytest.fixture
def plain_folder(tmp_path):
    """Return a function that writes a local OpenCLIP folder of random weights and returns its path."""

    def write(described=TINY_MODEL, **preprocess):
        torch.manual_seed(0)
        folder = tmp_path / "plain"
        folder.mkdir()
        config = {"model_cfg": described, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, **preprocess}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        kind = open_clip.CoCa if "multimodal_cfg" in described else open_clip.CLIP
        arguments = {key: value for key, value in described.items() if key != "custom_text"}
        save_file(kind(**arguments).state_dict(), folder / "open_clip_model.safetensors")
        return folder

    return write


@torch.no_grad()
def open_clip_scores(name, pretrained=None):
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained)
    image, tokens = preprocess(PICTURE)[None], open_clip.get_tokenizer(name)(TEXTS)
    model.eval()
    return model.encode_image(image, normalize=True) @ model.encode_text(tokens, normalize=True).T


@torch.no_grad()
def scores(model):
    h, t = model.encode_image(model.preprocess_val(PICTURE)[None]), model.encode_text(model.tokenizer(TEXTS))
    assert h.shape[:2] == (1, model.config["mixture_tokens"])
    torch.testing.assert_close(t.norm(dim=-1), torch.ones(3))
    result = model.similarity(h, t)
    torch.testing.assert_close(torch.einsum("btd,td->bt", model.contextualize(h, t), t), result, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.mixture_weights(h, t).sum(dim=-1), torch.ones(1, 3, model_heads(model)))
    assert not model.training
    return result


def model_heads(model):
    return model.config["pool_heads"] if model.config["pooling"] == "text" else 1


RESNET = {**TINY_MODEL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
COCA = {
    **TINY_MODEL,
    "custom_text": True,
    "text_cfg": {**TINY_MODEL["text_cfg"], "embed_cls": True, "output_tokens": True},
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("described", [TINY_MODEL, RESNET, COCA], ids=["ViT", "ResNet", "CoCa"])
def test_a_plain_folder_scores_as_open_clip(plain_folder, described):
    folder = plain_folder(described, resize_mode="squash")
    model = llip.open_model(folder)
    assert isinstance(model.visual, PlainImageTower)
    torch.testing.assert_close(scores(model), open_clip_scores(f"local-dir:{folder}"), atol=1e-6, rtol=0)
    assert model.config["architecture"]["resize_mode"] == "squash"
    assert model.visual.image_size == (32, 32)
    prefixed = llip.open_model(f"local-dir:{folder}")
    assert torch.equal(scores(prefixed), scores(model))


@pytest.fixture
def named(monkeypatch, tmp_path):
    """Return a function that makes TINY_MODEL what OpenCLIP calls `name`, and returns a file of random weights."""

    def register(name):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY_MODEL)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), tmp_path / "w.pt")
        return str(tmp_path / "w.pt")

    return register


def test_a_name_with_a_file_scores_as_open_clip(named):
    path = named("tiny")
    model = llip.open_model("tiny", path)
    torch.testing.assert_close(scores(model), open_clip_scores("tiny", path), atol=1e-6, rtol=0)
    assert model.logit_bias is None
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_bare_file_is_preprocessed_as_the_tags_of_its_model(named, monkeypatch):
    name = "ViT-B-16-SigLIP"
    path = named(name)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: None)
    model = llip.open_model(name, path)
    tag = open_clip.get_pretrained_cfg(name, "webli")
    config = open_clip.transform.PreprocessCfg(**model.visual.source.visual.preprocess_cfg)
    assert (config.mean, config.std, config.resize_mode) == (tag["mean"], tag["std"], "squash")


def test_a_tokenizer_that_does_not_ship_is_named(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError("no network")

    (tmp_path / "w.pt").touch()
    monkeypatch.setattr(open_clip, "get_tokenizer", refuse)
    with pytest.raises(UserError, match=r"tokenizer of 'ViT-B-16-SigLIP'.*tokenizer=FOLDER"):
        llip.open_model("ViT-B-16-SigLIP", str(tmp_path / "w.pt"))


@pytest.fixture
def ours(tmp_path):
    architecture = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0}}
    torch.manual_seed(0)
    model = create_model(ModelSpec(architecture, 1, "text", 4, 5.0, "sigmoid")).eval()
    path = tmp_path / "c.pt"
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path


def test_checkpoints_and_exports(ours, tmp_path):
    expected = scores(llip.load_pretrained(ours))
    export(ours, tmp_path / "out")
    assert (tmp_path / "out" / "open_clip_config.json").is_file()  # for OpenCLIP, beside ours
    for path in (ours, str(ours), tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        model = llip.open_model(path)
        assert model.config["pooling"] == "text"
        assert torch.equal(scores(model), expected)


def test_mistakes_are_one_message(ours, plain_folder, tmp_path):
    folder = plain_folder()
    bare = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, bare)
    for arguments, options, message in (
        (("ViT-B-61",), {}, "neither a path nor an OpenCLIP model.*ViT-B-16"),
        (("ViT-B-32",), {}, "needs weights.*openai"),
        (("ViT-B-32", "opneai"), {}, "neither a file nor a tag"),
        (("ViT-B-32", str(ours)), {}, "OpenCLIP cannot open 'ViT-B-32'"),
        ((folder, "openai"), {}, "brings its own weights"),
        ((ours, "openai"), {}, "brings its own weights"),
        ((folder,), {"ema": True}, "no average"),
        ((ours,), {"ema": True}, "no average"),
        ((bare,), {}, "does not describe its model"),
        ((tmp_path / "none.pt",), {}, "is not there"),
        ((tmp_path,), {}, "holds no weights"),
    ):
        with pytest.raises(UserError, match=message):
            llip.open_model(*arguments, **options)


def test_models_without_images_are_no_choice(monkeypatch):
    audio = {"embed_dim": 16, "audio_cfg": {"layers": 2}, "text_cfg": {"width": 16}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Audio-B-16", audio)
    for names in (llip.list_models, llip.list_further_models):
        names.cache_clear()
        assert "Audio-B-16" not in names()
        names.cache_clear()
    with pytest.raises(UserError, match="unknown model 'Audio-B-61'"):
        llip.get_tokenizer("Audio-B-61")
    with pytest.raises(UserError, match="not a model of images and texts"):
        llip.get_tokenizer("Audio-B-16")
    with pytest.raises(UserError, match="not a model of images and texts"):
        llip.open_model("Audio-B-16", "openai")
