"""Towers against OpenCLIP's own, parameter counts, names that resolve or are refused, weights in and out."""

import json

import open_clip
import pytest
import torch

import llip
from llip.errors import UserError
from llip.open_clip.architecture import list_models, resolve_architecture
from llip.open_clip.factory import ModelSpec, create_model
from tests.helpers import TINY_MODEL


def tiny(tokens=3, pooling="text", loss="sigmoid", heads=4, **vision):
    architecture = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0, **vision}}
    return create_model(ModelSpec(architecture, tokens, pooling, heads, 5.0, loss))


def inputs(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 32), llip.get_tokenizer(context_length=12)(["a cat", "two dogs here"][:batch])


def test_one_token_with_openclip_weights_is_openclip(tmp_path):
    theirs = open_clip.CustomTextCLIP(**TINY_MODEL).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    ours, _, _ = llip.create_model_and_transforms(
        str(tmp_path / "tiny.json"), mixture_tokens=1, pooling="first", pretrained=str(tmp_path / "clip.pt")
    )
    ours.eval()
    images, tokens = inputs()
    with torch.no_grad():
        h, t = ours.encode_image(images), ours.encode_text(tokens)
        torch.testing.assert_close(h[:, 0], theirs.encode_image(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(t, theirs.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)
        z = ours.contextualize(h, t)[:, 0]
        torch.testing.assert_close(z, theirs.encode_image(images, normalize=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_parameter_counts_are_openclips_plus_the_methods(tokens):
    theirs = sum(p.numel() for p in open_clip.CustomTextCLIP(**TINY_MODEL).parameters())
    width, embed = TINY_MODEL["vision_cfg"]["width"], TINY_MODEL["embed_dim"]

    def count(**kwargs):
        return sum(p.numel() for p in tiny(tokens, **kwargs).parameters())

    extra = 2 * (tokens - 1) * width
    assert count(pooling="first", loss="softmax") == theirs + extra
    assert count(pooling="mean", loss="sigmoid") == theirs + extra + 1
    assert count(pooling="learned", loss="softmax") == theirs + extra + tokens
    assert count(pooling="text", loss="sigmoid") == theirs + extra + 4 * embed**2 + 1


@pytest.mark.parametrize("pooling", ["first", "mean", "learned", "text"])
def test_gradient_checkpointing_changes_no_value(pooling):
    images, tokens = inputs()
    model = tiny(pooling=pooling).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, tokens).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_mixture_tokens_differ_and_patch_dropout_spares_them():
    model = tiny(tokens=4, patch_dropout=0.5, image_size=64).train()
    images = torch.randn(2, 3, 64, 64)
    assert model.visual.embed(images).shape == (2, 4 + 8, 32)
    assert model.encode_image(images).shape == (2, 4, 16)
    assert model.eval().visual.embed(images).shape == (2, 4 + 16, 32)
    h = model.encode_image(images)
    assert torch.cdist(h[0], h[0])[0, 1:].min() > 1e-3


def test_the_32_class_token_vits_resolve():
    names = list_models()
    library = [name for name in names if name in open_clip.list_models()]
    assert len(library) == 32
    assert "ViT-bigG-14-quickgelu" in library
    for name in names:
        assert resolve_architecture(name)["vision_cfg"]["patch_size"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "ResNet"),
        ("ViT-B-16-SigLIP", "timm"),
        ("coca_ViT-B-32", "CoCa"),
        ("roberta-ViT-B-32", "text encoder .* is no folder"),
        ("ViT-B-61", "ViT-B-16"),
        ("nowhere/model.json", "not there"),
    ],
)
def test_other_models_are_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=reason):
        resolve_architecture(name)


def test_model_json_mistakes(tmp_path):
    path = tmp_path / "m.json"
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as json"):
        resolve_architecture(str(path))
    path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "widht": 3}}))
    with pytest.raises(UserError, match=r"vision_cfg\.widht.*width"):
        resolve_architecture(str(path))
    path.write_text(json.dumps(TINY_MODEL))
    with pytest.raises(UserError, match="image_size 33"):
        resolve_architecture(str(path), image_size=33)
    with pytest.raises(UserError, match="pool_heads = 3"):
        llip.create_model_and_transforms(str(path), pool_heads=3)


def save(model, path, prefix=""):
    torch.save(
        {"model": model.config, "state_dict": {prefix + key: value for key, value in model.state_dict().items()}}, path
    )
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_load_back_to_the_same_scores(tmp_path, prefix):
    model = tiny().eval()
    loaded = llip.load_pretrained(save(model, tmp_path / "c.pt", prefix))
    images, tokens = inputs()
    torch.testing.assert_close(loaded(images, tokens), model(images, tokens))
    assert not loaded.training
    assert loaded.tokenizer(["a"]).shape == (1, 12)


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = save(tiny(), tmp_path / "c.pt")
    with pytest.raises(UserError, match="is not there"):
        llip.load_pretrained(tmp_path / "none.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        llip.load_pretrained(path)
    torch.save({"model": object()}, path)
    with pytest.raises(UserError, match="refused"):
        llip.load_pretrained(path)
    model = tiny()
    state = model.state_dict()
    state["pooling.q_porj.weight"] = state.pop("pooling.q_proj.weight")
    torch.save({"model": model.config, "state_dict": state}, path)
    with pytest.raises(UserError, match=r"missing pooling\.q_proj\.weight.*nearest: pooling\.q_proj\.weight"):
        llip.load_pretrained(path)


def test_normalising_on_the_device_is_the_transform(tmp_path):
    from PIL import Image

    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    model, _, preprocess = llip.create_model_and_transforms(str(tmp_path / "tiny.json"), pool_heads=4)
    expected = preprocess(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(model.normalise(pixels[None])[0], expected, atol=1e-6, rtol=0)
