"""Exports: folders that load back, OpenCLIP's own loading of them, cards, and programs without our code."""

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.transforms import IMAGE_MEAN, IMAGE_STD
from llip.open_clip.weights.load import load_weights
from llip.tools.export.__main__ import export, main
from tests.helpers import TINY_MODEL


def checkpoint(folder, tokens=3, pooling="text", loss="sigmoid", pixels=None, pair_tokens="mixture"):
    architecture = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0}}
    torch.manual_seed(0)
    model = create_model(ModelSpec(architecture, tokens, pooling, 4, 5.0, loss, pair_tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if pixels:
        model.visual.set_pixel_statistics(*pixels)
    path = folder / "run" / "checkpoints" / "latest.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path, model.eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32), llip.get_tokenizer(context_length=12)(["a cat", "two dogs"])


@pytest.mark.slow
def test_a_model_whose_texts_attend_to_patches(tmp_path):
    path, model = checkpoint(tmp_path, 1, "flair", pair_tokens="patches")
    outcome = export(path, tmp_path / "out", torch_export=True)
    loaded = llip.load_pretrained(tmp_path / "out")
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert not outcome["open_clip"]  # one token, yet no plain OpenCLIP model
    scorer = torch.export.load(tmp_path / "out" / "scorer.pt2").module()
    images, tokens = inputs()
    h, t = model.encode_image(images), model.encode_text(tokens)
    torch.testing.assert_close(scorer(h, t), model.similarity(h, t))


@pytest.mark.parametrize("pooling", ["first", "mean", "learned", "text"])
def test_a_folder_loads_back_to_the_same_scores(tmp_path, pooling):
    path, model = checkpoint(tmp_path, pooling=pooling)
    outcome = export(path, tmp_path / "out")
    loaded = llip.load_pretrained(tmp_path / "out")
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert loaded.config == model.config
    assert set(outcome["files"]) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    again = export(tmp_path / "out", tmp_path / "again")
    assert again["files"]["model.safetensors"] == outcome["files"]["model.safetensors"]


def test_a_users_pooling_travels_with_the_export(tmp_path, monkeypatch):
    lab, shelf = tmp_path / "lab", tmp_path / "shelf"
    lab.mkdir()
    (lab / "mine.py").write_text(
        "from llip.open_clip.pooling import MeanTokens\n\n\nclass Mine(MeanTokens):\n    note = 1\n"
    )
    path, model = checkpoint(tmp_path, pooling=f"{lab}/mine.py:Mine")
    for _ in range(2):  # the second export replaces the first
        export(path, lab / "out")
    lab.rename(shelf)  # the original file is gone, and the export lies elsewhere
    monkeypatch.chdir("/")
    for opened in (shelf / "out", shelf / "out" / "model.safetensors"):
        loaded = llip.load_pretrained(opened)
        assert loaded.pooling.note == 1
        assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_an_export_is_a_start_for_training(tmp_path):
    path, model = checkpoint(tmp_path)
    export(path, tmp_path / "out")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    started, _, _ = llip.create_model_and_transforms(
        str(tmp_path / "tiny.json"), mixture_tokens=3, pool_heads=4, pretrained=str(tmp_path / "out")
    )
    assert torch.equal(started.eval()(*inputs()), model(*inputs()))


@pytest.mark.parametrize("pooling", ["first", "mean", "text"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_one_token_loads_into_plain_openclip(tmp_path, pooling, loss):
    half = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    path, model = checkpoint(tmp_path, 1, pooling, loss, half)
    outcome = export(path, tmp_path / "out")
    assert outcome["open_clip"]
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    theirs.eval()
    from PIL import Image

    picture = Image.effect_mandelbrot((40, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a cat", "two dogs"])
    assert torch.equal(tokens, inputs()[1])
    ours = llip.load_pretrained(tmp_path / "out")
    with torch.no_grad():
        t = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(t, ours.encode_text(tokens), atol=1e-6, rtol=0)
        z = ours.contextualize(ours.encode_image(ours.preprocess_val(picture)[None]), t)[:, 0]
        torch.testing.assert_close(theirs.encode_image(preprocess(picture)[None], normalize=True), z, atol=1e-5, rtol=0)
    assert theirs.logit_scale.item() == model.logit_scale.item()
    assert (theirs.logit_bias is None) == (loss == "softmax")


def test_images_are_squashed_where_the_source_squashed_them(tmp_path):
    described = {"model_cfg": TINY_MODEL, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "m.json").write_text(json.dumps(described))
    model, _, preprocess = llip.create_model_and_transforms(str(tmp_path / "m.json"), pool_heads=4, pooling="first")
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    export(tmp_path / "c.pt", tmp_path / "out")
    from PIL import Image

    picture = Image.effect_mandelbrot((90, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    small = torch.from_numpy(np.array(picture.resize((32, 32), Image.BICUBIC))).permute(2, 0, 1) / 255
    expected = (small - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
    loaded = llip.load_pretrained(tmp_path / "out")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for transform in (preprocess, loaded.preprocess_val, theirs):
        torch.testing.assert_close(transform(picture), expected, atol=1e-5, rtol=0)
    described["preprocess_cfg"]["resize_mode"] = "skwash"
    (tmp_path / "m.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="resize_mode = 'skwash'"):
        llip.create_model_and_transforms(str(tmp_path / "m.json"))


def test_one_token_loads_into_openclip_as_a_file(tmp_path):
    path, model = checkpoint(tmp_path, 1, "first", "softmax")
    export(path, tmp_path / "out")
    for kind in (open_clip.CLIP, open_clip.CustomTextCLIP):
        theirs = kind(**TINY_MODEL).eval()
        open_clip.load_checkpoint(theirs, str(tmp_path / "out" / "open_clip_model.safetensors"))
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode_image(inputs()[0]), model.encode_image(inputs()[0])[:, 0])


def test_more_tokens_say_why_not(tmp_path, capsys):
    path, _ = checkpoint(tmp_path)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert "no form for plain OpenCLIP: the image tower has 3 mixture tokens" in capsys.readouterr().out
    assert "Plain OpenCLIP cannot load it: the image tower has 3" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "open_clip_config.json").exists()


def results(path, size):
    task = {"metric": "top1", "value": 0.625, "n": 16, "seconds": 1.0}
    identity = {"config": "tiny", "checkpoint": {"path": "x.pt", "bytes": size, "modified_ns": 0}}
    path.write_text(json.dumps({"model": identity, "tasks": {"birds": task}, "mean": 0.625}))
    return path


def test_the_card_carries_the_results(tmp_path, capsys):
    path, model = checkpoint(tmp_path)
    good = results(tmp_path / "results.json", path.stat().st_size)
    assert main([str(path), "--out", str(tmp_path / "out"), "--results", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["README.md"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    import yaml

    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "zero-shot-image-classification"
    assert "# run\n" in card
    assert "| birds | top1 | 62.5 | 16 |" in card
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card
    bad = results(tmp_path / "bad.json", 17)
    assert main([str(path), "--out", str(tmp_path / "other"), "--results", str(bad)]) == 2
    assert "another checkpoint" in capsys.readouterr().err
    bad.write_text("{}")
    assert main([str(path), "--out", str(tmp_path / "other"), "--results", str(bad)]) == 2
    assert not (tmp_path / "other").exists()


def test_folders_of_others_are_left_alone(tmp_path, capsys):
    path, _ = checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "other files than those of an export" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    new = tmp_path / "new"
    assert main([str(path), "--out", str(new)]) == 0
    (new / "scorer.pt2").touch()  # of an earlier export
    (new / "notes.txt").touch()
    assert main([str(path), "--out", str(new)]) == 0  # over itself is fine
    assert not (new / "scorer.pt2").exists()
    assert (new / "notes.txt").exists()
    assert main([str(tmp_path / "none.pt"), "--out", str(tmp_path / "x")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "pooling"), [(3, "text"), (2, "learned")])
def test_exported_programs_run_without_our_code(tmp_path, tokens, pooling):
    path, model = checkpoint(tmp_path, tokens, pooling)
    outcome = export(path, tmp_path / "out", torch_export=True)
    assert {f"{name}.pt2" for name in ("image_encoder", "text_encoder", "scorer")} <= outcome["checks"].keys()
    load = [
        torch.export.load(tmp_path / "out" / f"{n}.pt2").module() for n in ("image_encoder", "text_encoder", "scorer")
    ]
    images, tokens = inputs()
    with torch.no_grad():
        scores = load[2](load[0](images), load[1](tokens))
    torch.testing.assert_close(scores, model(images, tokens).detach(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_programs_of_copied_tokens(tmp_path):
    path, model = checkpoint(tmp_path, 4)
    source = open_clip.CustomTextCLIP(**TINY_MODEL)
    load_weights(model, source.state_dict(), towers_only=True)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    outcome = export(path, tmp_path / "out", torch_export=True)
    assert max(outcome["checks"].values()) < 1e-4


def test_onnx_programs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, model = checkpoint(tmp_path)
    export(path, tmp_path / "out", onnx=True)
    names = ("image_encoder", "text_encoder", "scorer")
    image, text, scorer = (onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx") for name in names)
    images, tokens = inputs()
    h = image.run(None, {"images": images.numpy()})[0]
    t = text.run(None, {"tokens": tokens.numpy()})[0]
    scores = torch.from_numpy(scorer.run(None, {"h": h, "t": t})[0])
    torch.testing.assert_close(scores, model(images, tokens).detach(), atol=1e-5, rtol=0)


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export(path, tmp_path / "out", onnx=True)
