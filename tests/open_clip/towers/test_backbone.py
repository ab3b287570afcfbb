"""Mixture heads on backbones of timm: against timm's own features, and against the head's equations in float64."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.tools.export.__main__ import export
from tests.helpers import BACKBONE_MODEL, TINY_MODEL

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
FAMILIES = {  # the family's own constructor at another size; image size; side of the map, prefix tokens
    "convnext_atto": (CONVNEXT, 64, 2, 0),
    "tf_efficientnet_lite0": ({}, 64, 2, 0),
    "resnet10t": ({}, 64, 2, 0),
    "swin_tiny_patch4_window7_224": (SWIN, 64, 2, 0),
    "coatnet_nano_rw_224": ({"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}, 64, 2, 0),
    "vit_small_patch14_reg4_dinov2": (VIT, 56, 4, 5),
    "vit_small_patch16_dinov3": (VIT, 48, 3, 5),
    "vit_base_patch16_siglip_224": (VIT, 48, 3, 0),
}


@pytest.fixture
def tiny(monkeypatch):
    """Return a model on a backbone of the given family and its image size; timm builds the family's tiny ones."""
    create = timm.create_model

    def build(family, count=3, pair_tokens="mixture", **head):
        kwargs, size, _, _ = FAMILIES[family]
        monkeypatch.setattr("timm.create_model", lambda name, **options: create(name, **options, **kwargs))
        torch.manual_seed(0)
        return create_model(ModelSpec(described(family, size, **head), count, "text", 4, 5.0, "sigmoid", pair_tokens))

    return build


def described(family, size, **head):
    vision = {"timm_model_name": family, "image_size": size, "timm_pool": "", "timm_proj": "none"}
    return {**BACKBONE_MODEL, "vision_cfg": vision, "mixture_head": {**BACKBONE_MODEL["mixture_head"], **head}}


def inputs(size, count=3):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size), llip.get_tokenizer(context_length=12)(["one", "two of them"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_timms_features_trains_and_survives_a_checkpoint(tiny, family, tmp_path):
    _, size, side, prefix = FAMILIES[family]
    model = tiny(family)
    images, tokens = inputs(size)
    trunk = model.eval().visual.trunk
    assert model.visual.pixel_statistics() == tuple(
        map(list, (trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"]))
    )
    with torch.no_grad():
        expected = trunk.forward_features(model.visual.source_pixels(images))
        if family == "convnext_atto":
            expected = trunk.head.norm(expected)  # which timm applies after its pooling
        if expected.ndim == 4 and family.startswith("swin"):
            expected = expected.flatten(1, 2)
        elif expected.ndim == 4:
            expected = expected.flatten(2).transpose(1, 2)
        features = model.visual.frozen_features(images)
        torch.testing.assert_close(features, expected)
        assert features.shape[1] == side**2 + prefix
        torch.testing.assert_close(
            model.encode_image_features(features.half()), model.encode_image(images), atol=2e-3, rtol=0
        )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(images, tokens).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["logit_scale", "logit_bias"]
    torch.optim.SGD(model.parameters(), 1.0).step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("visual.trunk.") for name in changed)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    again = llip.load_pretrained(tmp_path / "c.pt")
    torch.testing.assert_close(again(images, tokens), model.eval()(images, tokens))


def test_the_head_is_its_equations(tiny):
    model = tiny("vit_small_patch16_dinov3", count=4, blocks=2, pair_tokens="both").eval()
    for parameter in model.visual.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(3, 14, 32)
    weights = {name: p.detach().double() for name, p in model.visual.head.named_parameters()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    u = linear(norm(features.double(), "norm_in", 1e-5), "proj_in") + weights["positions"]
    tokens = torch.cat([weights["latents"].expand(3, -1, -1), u], dim=1)  # [B, K + L, C]
    for block in ("blocks.0", "blocks.1"):
        queries, keys, values = linear(norm(tokens, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        parts = []
        for head in range(2):  # of width 8
            place = slice(8 * head, 8 * head + 8)
            logits = torch.einsum("bnc,bmc->bnm", queries[..., place], keys[..., place]) / 8**0.5
            parts.append(logits.softmax(-1) @ values[..., place])
        tokens = tokens + linear(torch.cat(parts, dim=-1), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"{block}.mlp.fc2")
    expected = linear(norm(tokens, "norm", 1e-5), "proj")
    expected = torch.cat(
        [expected[:, :4], expected[:, 4 + 5 :]], dim=1
    )  # mixture tokens, and patches without registers
    torch.testing.assert_close(model.encode_image_features(features).double(), expected, atol=1e-4, rtol=1e-4)


def test_features_are_pooled_to_a_grid_and_prefix_tokens_are_kept_or_left_out(tiny):
    images, _ = inputs(56)
    with torch.no_grad():
        trunk = tiny("vit_small_patch14_reg4_dinov2").eval().visual
        tokens = trunk.frozen_features(images)  # class token, 4 registers, 4 x 4 patches
        pooled = tiny("vit_small_patch14_reg4_dinov2", grid=2).eval().visual
        of_map = tiny("vit_small_patch14_reg4_dinov2", grid=2, tokens="map").eval().visual
        patches = tokens[:, 5:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(pooled.frozen_features(images), torch.cat([tokens[:, :5], patches], dim=1))
        torch.testing.assert_close(of_map.frozen_features(images), patches)
    assert pooled.grid_size == of_map.grid_size == (2, 2)


@pytest.mark.parametrize("family", ["vit_small_patch16_dinov3", "convnext_atto"])
def test_gradient_checkpointing_changes_no_gradient(tiny, family):
    gradients = []
    for enable in (False, True):
        model = tiny(family).train()
        model.set_grad_checkpointing(enable)
        model(*inputs(FAMILIES[family][1])).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.visual.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_dropout_is_of_training_alone(tiny):
    model = tiny("resnet10t", dropout=0.5)
    features = torch.randn(2, 4, 512)
    eval_twice = [model.eval().encode_image_features(features) for _ in range(2)]
    assert torch.equal(*eval_twice)
    train_twice = [model.train().encode_image_features(features) for _ in range(2)]
    assert not torch.allclose(*train_twice)


@pytest.mark.slow
def test_a_backbone_becomes_a_program(tiny, tmp_path):
    model = tiny("resnet10t")
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    assert export(tmp_path / "c.pt", tmp_path / "out", torch_export=True)["checks"]["image_encoder.pt2"] < 1e-4
    images, tokens = inputs(64)
    torch.testing.assert_close(llip.load_pretrained(tmp_path / "out")(images, tokens), model.eval()(images, tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture_head": {"depth": 2}}, r"unknown key 'mixture_head.depth'"),
        ({"mixture_head": {"block": 2}}, r"'mixture_head.block'.*Did you mean 'blocks'"),
        ({"mixture_head": {"width": 20, "heads": 3}}, r"heads = 3 does not divide mixture_head.width = 20"),
        ({"mixture_head": {"blocks": 0}}, r"mixture_head.blocks = 0: expected an integer of at least 1"),
        ({"mixture_head": {"dropout": 1.5}}, r"mixture_head.dropout = 1.5"),
        ({"mixture_head": {"tokens": "both"}}, r"mixture_head.tokens = 'both': expected 'map' or 'sequence'"),
        ({"mixture_head": {"tokens": "sequence"}}, r"resnet10t has no class token"),
        ({"mixture_head": {"grid": 7}}, r"mixture_head.grid = 7: resnet10t gives 2 x 2"),
        ({"mixture_head": 3}, r"mixture_head: expected an object, found int"),
        ({"vision_cfg": TINY_MODEL["vision_cfg"]}, r"mixture_head needs a backbone of timm"),
        ({"vision_cfg": {"timm_model_name": "resnet10"}}, r"timm has no model 'resnet10'.*'resnet10t'"),
        (
            {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 50}},
            r"50.*patches of 16 pixels",
        ),
        ({"vision_cfg": {"timm_model_name": "mixer_s32_224", "image_size": 64}}, r"image_size 64.*224 x 224"),
        ({"mixture_head": None}, r"mixture_head: expected an object"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    (tmp_path / "m.json").write_text(json.dumps(BACKBONE_MODEL | changes))
    with pytest.raises(UserError, match=message):
        llip.create_model_and_transforms(str(tmp_path / "m.json"), pool_heads=4)


def test_a_map_without_a_head_is_refused_with_the_way_out(tmp_path):
    model = {key: value for key, value in BACKBONE_MODEL.items() if key != "mixture_head"}
    (tmp_path / "m.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match=r"resnet10t.*it has no mixture_head"):
        llip.create_model_and_transforms(str(tmp_path / "m.json"), pool_heads=4)
