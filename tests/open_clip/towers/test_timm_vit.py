"""timm towers: tiny ones built by timm and OpenCLIP themselves with random weights, and what Llip makes of them."""

import json
import math

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

import llip
from llip.errors import UserError
from llip.open_clip.architecture import list_further_models, resolve_architecture
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.towers.timm_vit import timm_tower
from llip.open_clip.weights.load import load_weights
from llip.tools.export.__main__ import export
from tests.helpers import TINY_MODEL

TEXT = {**TINY_MODEL["text_cfg"], "pool_type": "last", "no_causal_mask": True, "proj_bias": True}


@pytest.fixture
def tiny_timm(monkeypatch):
    """Let OpenCLIP's timm towers be tiny: the library's own constructor, at another size."""
    create = timm.create_model

    def tiny(name, **options):
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return create(name, **options, **sizes)

    monkeypatch.setattr("open_clip.timm_model.timm.create_model", tiny)


EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
PE = {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": "linear"}
SIGLIP = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
TOKEN = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
REGISTERS = {"timm_model_name": "vit_small_patch14_reg4_dinov2", "timm_pool": "token", "timm_proj": "linear"}


def architecture(vision, size=32):
    # A SigLIP trunk projects nothing: the embedding is as wide as the trunk.
    vision = {**vision, "image_size": size, "patch_dropout": 0.0}
    return {"embed_dim": 32, "quick_gelu": False, "vision_cfg": vision, "text_cfg": TEXT}


def theirs(vision):
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**architecture(vision), init_logit_bias=-9.0).eval()
    sharp = ("token", "pos_embed", "qkv", "q_proj", "k_proj", "latent", ".kv.")  # so that attention is not uniform
    for name, parameter in model.named_parameters():
        if any(part in name for part in sharp):
            nn.init.normal_(parameter, std=0.5)
    return model


def ours(vision, tokens, pooling="text", size=32):
    return create_model(ModelSpec(architecture(vision, size), tokens, pooling, 4, 5.0, "sigmoid"))


def inputs(size=32):
    torch.manual_seed(1)
    return torch.randn(3, 3, size, size), llip.get_tokenizer(context_length=12)(["one", "two of them"])


@torch.no_grad()
def their_scores(model, images, tokens):
    return model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T


@pytest.mark.parametrize("vision", [SIGLIP, TOKEN, EVA, PE], ids=["latents", "class token", "EVA", "EVA latents"])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("pooling", ["mean", "text"])
def test_step_0_is_the_source(tiny_timm, vision, tokens, pooling):
    source, model = theirs(vision), ours(vision, tokens, pooling)
    report = load_weights(model, source.state_dict(), towers_only=True, spread=0.0)
    assert not report.unexpected
    expected = their_scores(source, *inputs())
    torch.testing.assert_close(model.eval()(*inputs()).detach(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.train()(*inputs()).detach(), expected, atol=1e-5, rtol=0)
    assert model.encode_image(inputs()[0]).shape == (3, tokens, 32)
    assert model.logit_bias.item() == -9.0


@pytest.mark.parametrize("vision", [TOKEN, REGISTERS, EVA], ids=["class token", "registers", "EVA"])
@torch.no_grad()
def test_patches_are_the_projected_outputs_of_the_trunk(tiny_timm, vision):
    source = theirs(vision)
    prefix = source.visual.trunk.num_prefix_tokens
    model = create_model(ModelSpec(architecture(vision), prefix, "text", 4, 5.0, "sigmoid", "patches"))
    load_weights(model, source.state_dict(), towers_only=True, spread=0.0)
    h = model.eval().encode_image(inputs()[0])
    outputs = source.visual.trunk.forward_features(inputs()[0])[:, prefix:]  # the last norm included
    expected = source.visual.head(source.visual.trunk.head(source.visual.trunk.fc_norm(outputs)))
    assert h.shape[1] == prefix + expected.shape[1] == model.visual.output_tokens
    torch.testing.assert_close(h[:, prefix:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", [SIGLIP, PE], ids=["latents", "EVA latents"])
def test_attention_pools_give_no_patches(tiny_timm, vision):
    with pytest.raises(UserError, match=r"pools by attention.*pair_tokens=mixture"):
        create_model(ModelSpec(architecture(vision), 2, "text", 4, 5.0, "sigmoid", "patches"))


def test_registers_become_mixture_tokens_beside_copies_of_the_class_token(tiny_timm):
    source, model = theirs(REGISTERS), ours(REGISTERS, 8, "first")
    load_weights(model, source.state_dict(), towers_only=True, spread=0.0)
    torch.testing.assert_close(model.eval()(*inputs()).detach(), their_scores(source, *inputs()), atol=1e-5, rtol=0)
    offset = model.visual.key_offset
    assert torch.equal(offset[1:5], torch.zeros(4))  # the registers, which are no copies
    torch.testing.assert_close(offset[[0, 5, 6, 7]], torch.full((4,), -math.log(4)))
    torch.testing.assert_close(model.visual.trunk.cls_token[0, 1:5], source.visual.trunk.reg_token[0])
    assert not any("reg_token" in name for name in model.state_dict())
    with pytest.raises(UserError, match="5 prefix tokens"):
        ours(REGISTERS, 3)


@pytest.mark.parametrize("vision", [SIGLIP, TOKEN, REGISTERS, EVA], ids=["latents", "class token", "registers", "EVA"])
def test_another_image_size_is_what_timm_makes_of_it(tiny_timm, vision):
    source, model = theirs(vision), ours(vision, 5, "first", size=64)
    report = load_weights(model, source.state_dict(), towers_only=True, spread=0.0)
    assert any("interpolated" in note for note in report.notes)
    source.visual.set_input_size(64)
    torch.testing.assert_close(model.eval()(*inputs(64)).detach(), their_scores(source, *inputs(64)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision", [SIGLIP, TOKEN, REGISTERS, EVA], ids=["latents", "class token", "registers", "EVA"])
def test_fresh_tokens_differ_train_and_survive_a_checkpoint(tiny_timm, tmp_path, vision):
    torch.manual_seed(0)
    model = ours(vision, 6)
    assert model.visual.key_offset is None
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(*inputs()).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == ["logit_scale", "logit_bias"]
        gradients.append(model.visual.trunk.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    tokens = model.visual.trunk.attn_pool.latent if vision is SIGLIP else model.visual.trunk.cls_token[:, -2:]
    assert torch.pdist(tokens[0]).min() > 0.01
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    again = llip.load_pretrained(tmp_path / "c.pt")
    torch.testing.assert_close(again(*inputs()), model.eval()(*inputs()))


def test_no_latent_sees_another(tiny_timm):
    torch.manual_seed(0)
    model = ours(SIGLIP, 4).eval()
    for projection in (model.visual.trunk.attn_pool.q, model.visual.trunk.attn_pool.kv):
        nn.init.normal_(projection.weight, std=0.5)
    images = inputs()[0]
    before = model.encode_image(images).detach()
    with torch.no_grad():
        model.visual.trunk.attn_pool.latent[0, 2] += 1.0
    after = model.encode_image(images).detach()
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-3


def test_foreign_weights_of_a_siglip_tower_see_pixels_as_timm_says(tiny_timm, tmp_path):
    source = theirs(SIGLIP)
    torch.save(source.state_dict(), tmp_path / "siglip.pt")
    (tmp_path / "m.json").write_text(json.dumps(architecture(SIGLIP)))
    model, _, _ = llip.create_model_and_transforms(
        str(tmp_path / "m.json"), mixture_tokens=2, pool_heads=4, pretrained=str(tmp_path / "siglip.pt")
    )
    assert model.visual.pixel_statistics() == ([0.5] * 3, [0.5] * 3)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "ours.pt")
    fresh, _, _ = llip.create_model_and_transforms(str(tmp_path / "m.json"), pool_heads=4)
    torch.save({"model": fresh.config, "state_dict": fresh.state_dict()}, tmp_path / "scratch.pt")
    for name, expected in (("ours", [0.5] * 3), ("scratch", list(open_clip.OPENAI_DATASET_MEAN))):
        again, _, _ = llip.create_model_and_transforms(
            str(tmp_path / "m.json"),
            mixture_tokens=2 if name == "ours" else 1,
            pool_heads=4,
            pretrained=str(tmp_path / f"{name}.pt"),
        )
        assert again.visual.pixel_statistics()[0] == pytest.approx(expected)


@pytest.mark.parametrize("vision", [SIGLIP, TOKEN, EVA], ids=["latents", "class token", "EVA"])
def test_one_token_leaves_for_plain_openclip(tiny_timm, tmp_path, vision):
    model = ours(vision, 1, "first").eval()
    load_weights(model, theirs(vision).state_dict(), towers_only=True)
    model.visual.set_pixel_statistics((0.5,) * 3, (0.5,) * 3)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    assert export(tmp_path / "c.pt", tmp_path / "out")["open_clip"]
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    images, tokens = inputs()
    found = their_scores(plain, model.visual.source_pixels(images), tokens)
    torch.testing.assert_close(found, model(images, tokens).detach(), atol=1e-5, rtol=0)
    headed = ours(vision, 1, "text")
    torch.save({"model": headed.config, "state_dict": headed.state_dict()}, tmp_path / "c.pt")
    assert "timm" in export(tmp_path / "c.pt", tmp_path / "other")["why_not"]


@pytest.mark.slow
@pytest.mark.parametrize("vision", [SIGLIP, EVA], ids=["latents", "EVA"])
def test_towers_become_programs(tiny_timm, tmp_path, vision):
    model = ours(vision, 3)
    load_weights(model, theirs(vision).state_dict(), towers_only=True)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    outcome = export(tmp_path / "c.pt", tmp_path / "out", torch_export=True)
    assert outcome["checks"]["image_encoder.pt2"] < 1e-4


def test_names_and_refusals(tmp_path):
    names = list_further_models()
    assert {"ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP2", "MobileCLIP2-L-14", "EVA02-B-16", "PE-Core-B-16"} <= set(names)
    for name in names:
        folder = str(tmp_path) if "tokenizer" in json.dumps(open_clip.get_model_config(name)) else None
        resolved = resolve_architecture(name, tokenizer=folder)
        assert "timm_model_name" in resolved["vision_cfg"] or resolved["text_cfg"]["hf_tokenizer_name"] == folder
    assert resolve_architecture("ViT-B-16-SigLIP2", tokenizer=str(tmp_path))["resize_mode"] == "squash"
    assert "resize_mode" not in resolve_architecture("ViT-B-16")
    with pytest.raises(UserError, match="tokenizer=FOLDER"):
        resolve_architecture("ViT-B-16-SigLIP2")
    with pytest.raises(UserError, match="leave it out"):
        resolve_architecture("ViT-B-16", tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="convnext"):
        resolve_architecture("convnext_base")
    path = tmp_path / "m.json"
    path.write_text(json.dumps(architecture({**TOKEN, "timm_model_name": "vit_base_patch61"})))
    with pytest.raises(UserError, match="timm has no model 'vit_base_patch61'"):
        resolve_architecture(str(path))


def test_a_trunk_that_does_not_fit_is_refused(tiny_timm):
    tower = TimmModel("vit_base_patch16_224", 32, image_size=32, pool="avg")
    with pytest.raises(UserError, match="pools by 'avg'"):
        timm_tower(tower, 2)


@pytest.mark.parametrize("vision", [TOKEN, EVA], ids=["class token", "EVA"])
def test_patch_dropout_spares_the_mixture_tokens(tiny_timm, vision):
    described = architecture(vision, 64)
    described["vision_cfg"]["patch_dropout"] = 0.5
    model = create_model(ModelSpec(described, 6, "text", 4, 5.0, "sigmoid")).train()
    tokens, _ = model.visual.embed(torch.randn(2, 3, 64, 64))
    assert tokens.shape[1] == 6 + 8
    assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 6, 32)
