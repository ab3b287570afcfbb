"""Weights to start from: sources built by OpenCLIP itself with random weights, and what Llip makes of them."""

import json
import math
import time

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.weights.load import find_weights, load_weights
from tests.helpers import TINY_MODEL, tiny_model_file


def architecture(**vision):
    return {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0, **vision}}


def tiny(tokens, pooling="text", loss="sigmoid", heads=4, **vision):
    return create_model(ModelSpec(architecture(**vision), tokens, pooling, heads, 5.0, loss))


def source(kind=open_clip.CustomTextCLIP, seed=0, **options):
    """Return an OpenCLIP model with random weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = kind(**TINY_MODEL, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj_weight", "out_proj.weight", "class_embedding", "positional_embedding")):
                parameter.copy_(torch.randn_like(parameter) * 0.7)
    return model


def inputs(size=32, batch=4):
    torch.manual_seed(1)
    images = torch.randn(batch, 3, size, size)
    return images, llip.get_tokenizer(context_length=12)([f"a {word} thing" for word in ("red", "big", "far")])


@torch.no_grad()
def source_scores(model, images, tokens):
    return model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T


@pytest.mark.parametrize("pooling", ["first", "mean", "learned", "text"])
@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_step_0_scores_are_the_sources_when_the_differences_are_zero(tokens, pooling):
    theirs, images_tokens = source(), inputs()
    model = tiny(tokens, pooling)
    load_weights(model, theirs.state_dict(), towers_only=True, spread=0.0)
    for mode in (model.train(), model.eval()):
        ours = mode(*images_tokens).detach()
        torch.testing.assert_close(ours, source_scores(theirs, *images_tokens), atol=1e-5, rtol=0)
    with torch.no_grad():  # the library's fused path of evaluation
        torch.testing.assert_close(model(*images_tokens), source_scores(theirs, *images_tokens), atol=1e-5, rtol=0)


def test_copies_that_count_fully_would_not_be_the_source():
    theirs, images_tokens = source(), inputs()
    model = tiny(32)
    load_weights(model, theirs.state_dict(), towers_only=True, spread=0.0)
    model.visual.key_offset = None
    assert (model(*images_tokens).detach() - source_scores(theirs, *images_tokens)).abs().max() > 1e-2


def test_the_seeded_differences_are_small_and_the_same_every_time():
    theirs, images_tokens = source(), inputs()
    models = [tiny(8), tiny(8)]
    for model in models:
        load_weights(model, theirs.state_dict(), towers_only=True)
    assert torch.equal(models[0].visual.class_embedding, models[1].visual.class_embedding)
    assert torch.equal(models[0].visual.class_embedding[0], theirs.visual.class_embedding)
    rows = models[0].visual.class_embedding.detach()
    assert torch.pdist(rows).min() > 0
    drift = (models[0](*images_tokens).detach() - source_scores(theirs, *images_tokens)).abs().max()
    assert 0 < drift < 0.05


def test_the_offset_trains_along_and_returns_with_the_checkpoint(tmp_path):
    model = tiny(6)
    load_weights(model, source().state_dict(), towers_only=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(*inputs()).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (model.visual.class_embedding, model.visual.positional_embedding))
    optimizer.step()
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    loaded = llip.load_pretrained(tmp_path / "c.pt")
    torch.testing.assert_close(loaded.visual.key_offset, torch.full((6,), -math.log(6)))
    torch.testing.assert_close(loaded(*inputs()), model.eval()(*inputs()))


def test_a_tower_from_scratch_has_no_offset_and_passes_no_mask():
    model = tiny(6)
    assert "visual.key_offset" not in model.state_dict()
    assert model.visual.attention_mask(model.visual.embed(inputs()[0])) is None


def test_gradient_checkpointing_and_patch_dropout_work_with_copies():
    model = tiny(4, image_size=64, patch_dropout=0.5)
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(**architecture(image_size=64))
    load_weights(model, theirs.state_dict(), towers_only=True)
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(*inputs(64)).sum().backward()
        gradients.append(model.visual.class_embedding.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layouts_prefixes_and_files(tmp_path, kind, prefix, suffix):
    theirs, path = source(kind), tmp_path / f"w{suffix}"
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        save_file(state, path)
    model, _, _ = llip.create_model_and_transforms(
        tiny_model_file(tmp_path), mixture_tokens=1, pool_heads=4, pretrained=str(path)
    )
    torch.testing.assert_close(model.eval()(*inputs()).detach(), source_scores(theirs, *inputs()), atol=1e-5, rtol=0)
    assert len(model.load_report.loaded) == len(theirs.state_dict()) - 1  # all but the scale, which has no bias


@pytest.mark.parametrize("size", [64, 96])
def test_another_image_size_is_what_openclip_makes_of_it(size):
    theirs = source()
    state = dict(theirs.state_dict())
    larger = open_clip.CustomTextCLIP(**architecture(image_size=size)).eval()
    resize_pos_embed(state, larger)  # the library's own interpolation
    larger.load_state_dict(state)
    model = tiny(3, image_size=size)
    report = load_weights(model, theirs.state_dict(), towers_only=True, spread=0.0)
    assert any("interpolated from 2 x 2" in note for note in report.notes)
    torch.testing.assert_close(
        model.eval()(*inputs(size)).detach(), source_scores(larger, *inputs(size)), atol=1e-5, rtol=0
    )


def test_one_tower_by_itself(caplog):
    theirs = source()
    model = tiny(2)
    fresh = model.text.token_embedding.weight.detach().clone()
    for state in (theirs.visual.state_dict(), {f"visual.{k}": v for k, v in theirs.visual.state_dict().items()}):
        report = load_weights(model, state, towers_only=True)
        assert all(key.startswith("visual.") for key in report.loaded)
        assert "no text tower" in caplog.text
    assert torch.equal(model.text.token_embedding.weight, fresh)
    report = load_weights(model, theirs.text.state_dict(), towers_only=True)
    assert all(key.startswith("text.") for key in report.loaded)
    assert torch.equal(model.text.token_embedding.weight, theirs.text.token_embedding.weight)
    assert "no visual tower" in caplog.text
    del state["visual.proj"]
    with pytest.raises(UserError, match=r"missing visual\.proj"):
        load_weights(model, state, towers_only=True)


def test_the_report_counts_and_names():
    state = dict(source().state_dict())
    state["visual.ln_pots.weight"] = state.pop("visual.ln_post.weight")
    state["text.ln_final.bias"] = torch.zeros(5)
    model = tiny(1)
    with pytest.raises(UserError) as error:
        load_weights(model, state, "w.pt", towers_only=True)
    message = str(error.value)
    assert "w.pt does not fit" in message
    assert "unexpected visual.ln_pots.weight (nearest: visual.ln_post.weight)" in message
    assert "text.ln_final.bias is (5,), expected (16,)" in message
    report = load_weights(model, state, "w.pt", towers_only=True, strict=False)
    assert report.unexpected == ("visual.ln_pots.weight",)
    assert [name for name, _, _ in report.reshaped] == ["text.ln_final.bias"]
    assert "visual.ln_post.weight" in report.missing
    assert len(report.loaded) + len(report.missing) + len(report.reshaped) == len(model.state_dict())
    summary = report.summary("w.pt")
    assert f"{len(report.loaded)} tensors loaded" in summary
    assert "1 unexpected, 1 of another shape" in summary
    with pytest.raises(UserError, match="does not fit"):
        load_weights(model, {"nothing": torch.zeros(1)}, towers_only=True, strict=False)
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(model, {"state_dict": {"a": 1}}, towers_only=True)


def test_another_number_of_mixture_tokens_names_the_field():
    with pytest.raises(UserError, match=r"mixture_tokens=3"):
        load_weights(tiny(5), tiny(3).state_dict(), towers_only=True)


def test_another_context_length_names_the_field():
    state = tiny(1).state_dict() | {"text.positional_embedding": torch.zeros(77, 16)}
    with pytest.raises(UserError, match=r"context_length=77"):
        load_weights(tiny(1), state, towers_only=True)


def test_scale_and_bias_come_over_only_together():
    clip, siglip = source(), source(init_logit_bias=-7.0, nonscalar_logit_scale=True)
    clip.logit_scale.data.fill_(4.6)
    sigmoid, softmax = tiny(1), tiny(1, loss="softmax")
    report = load_weights(sigmoid, clip.state_dict(), towers_only=True)
    assert any("are initialised" in note for note in report.notes)
    assert sigmoid.logit_scale.item() == pytest.approx(math.log(10))
    load_weights(softmax, clip.state_dict(), towers_only=True)
    assert softmax.logit_scale.item() == pytest.approx(4.6)
    load_weights(sigmoid, siglip.state_dict(), towers_only=True)
    assert sigmoid.logit_bias.item() == pytest.approx(-7.0)
    assert sigmoid.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_pixel_statistics_of_a_source_are_folded_into_the_tower(tmp_path):
    theirs = source()
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_MODEL, "preprocess_cfg": half}))
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    model, _, preprocess = llip.create_model_and_transforms(
        tiny_model_file(tmp_path), pool_heads=4, mixture_tokens=2, pretrained=str(folder)
    )
    from PIL import Image

    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    expected = theirs.encode_image((pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).detach()
    found = model.eval().encode_image(preprocess(picture)[None])[:, 0].detach()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert model.visual.pixel_statistics() == ([0.5] * 3, [0.5] * 3)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    again = llip.load_pretrained(tmp_path / "c.pt")
    torch.testing.assert_close(again.encode_image(preprocess(picture)[None])[:, 0].detach(), found)


def test_without_network_a_tag_comes_from_the_cache_or_fails_within_seconds(tmp_path, monkeypatch):
    repository = "timm/vit_base_patch16_clip_224.openai"
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["hf_hub"] == repository + "/"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"tag 'openai' could not be downloaded.*give its path"):
        find_weights("openai", "ViT-B-16")
    assert time.monotonic() - start < 10
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    cached = folder / "snapshots" / ("0" * 40) / "open_clip_pytorch_model.bin"
    cached.parent.mkdir(parents=True)
    cached.touch()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    assert find_weights("openai", "ViT-B-16").path == cached


def test_statistics_of_a_bare_file_are_those_that_all_tags_of_its_model_name(tmp_path):
    (tmp_path / "w.pt").touch()
    found = {name: find_weights(str(tmp_path / "w.pt"), name).pixels for name in ("ViT-B-16-SigLIP", "ViT-L-14", "x")}
    assert found["ViT-B-16-SigLIP"] == ((0.5,) * 3, (0.5,) * 3)
    assert found["ViT-L-14"] is None  # some of its weights saw one normalisation, some another
    assert found["x"] is None


def test_archives_with_code_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "jit.pt")
    with pytest.raises(UserError, match="TorchScript archive, which holds code"):
        llip.create_model_and_transforms(tiny_model_file(tmp_path), pool_heads=4, pretrained=str(tmp_path / "jit.pt"))


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(UserError, match=r"neither a file nor a tag, nor a folder.*openai"):
        llip.create_model_and_transforms("ViT-B-32", pretrained="opneai")
    with pytest.raises(UserError, match="holds no weights"):
        llip.create_model_and_transforms(tiny_model_file(tmp_path), pool_heads=4, pretrained=str(tmp_path))
