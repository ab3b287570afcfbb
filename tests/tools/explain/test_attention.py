"""Maps of mixture tokens: against attention worked out from the weights, and with a planted place."""

import copy
import json
import math

import pytest
import timm
import torch

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.tools.explain.attention import rollout, token_attention, tower_attention
from tests.helpers import BACKBONE_MODEL, TINY_MODEL


@pytest.fixture(scope="module")
def model(tiny_model):
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, mixture_tokens=3, pooling="text", pool_heads=2)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(module, x):
    """softmax(q k^T / sqrt(d)) from the weights of the attention [B, A, N, N]."""
    heads, width = module.num_heads, x.shape[-1]
    projected = x @ module.in_proj_weight.T + module.in_proj_bias
    q, k = (projected[..., i * width : (i + 1) * width].unflatten(-1, (heads, -1)).transpose(1, 2) for i in (0, 1))
    return (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)


@torch.no_grad()
def test_weights_of_every_block_are_those_of_the_formula(model, images):
    visual = model.visual
    x, expected = visual.embed(images), []
    for block in visual.transformer.resblocks:
        expected.append(by_hand(block.attn, block.ln_1(x)))
        x = block(x)
    for ours, theirs in zip(tower_attention(visual, images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    maps = token_attention(visual, images)
    assert maps.shape == (2, 3, 2, 2)
    torch.testing.assert_close(maps.flatten(2), expected[-1].mean(dim=1)[:, :3, 3:])


@torch.no_grad()
def test_copies_that_count_as_one_are_seen_as_the_tower_sees_them(model, images):
    """With offsets of -log 3 on three equal keys, the source's class token gets what the three get together."""
    visual = copy.deepcopy(model.visual)
    visual.class_embedding[1:] = visual.class_embedding[:1]
    visual.positional_embedding[1:3] = visual.positional_embedding[:1]
    visual.adopt_buffers({"key_offset": None})
    visual.key_offset.fill_(-math.log(3))
    (first, _), x = tower_attention(visual, images), visual.embed(images)
    block = visual.transformer.resblocks[0]
    source = by_hand(block.attn, block.ln_1(x[:, 2:]))  # one token and the patches
    torch.testing.assert_close(first[:, :, 2:, 3:], source[:, :, :, 1:])
    torch.testing.assert_close(first[:, :, 2:, :3].sum(dim=-1), source[:, :, :, 0])


@torch.no_grad()
def test_looking_changes_nothing(model, images):
    before = model.encode_image(images)
    token_attention(model.visual, images, "rollout")
    torch.testing.assert_close(model.encode_image(images), before, rtol=0, atol=0)
    assert torch.backends.mha.get_fastpath_enabled()


def timm_model(pool, name):
    """A tiny timm tower, built by the library."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": 48}
    architecture = {"embed_dim": 16, "quick_gelu": False, "vision_cfg": vision, "text_cfg": TINY_MODEL["text_cfg"]}
    torch.manual_seed(0)
    return create_model(ModelSpec(architecture, 3, "text", 2, 5.0, "sigmoid")).eval()


@pytest.fixture
def tiny_timm(monkeypatch):
    create = timm.create_model
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr("open_clip.timm_model.timm.create_model", lambda name, **more: create(name, **more, **sizes))


@torch.no_grad()
@pytest.mark.parametrize("how", ["last", "rollout"])
def test_a_class_token_of_timm(tiny_timm, how):
    visual = timm_model("token", "vit_base_patch16_224").visual
    images, expected = torch.randn(2, 3, 48, 48), []
    x, _ = visual.embed(images)
    for block in visual.trunk.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        expected.append((q @ k.transpose(2, 3) / 4).softmax(dim=-1))  # heads of 16
        x = block(x)
    maps = token_attention(visual, images, how)
    assert maps.shape == (2, 3, 3, 3)
    weights = expected[-1].mean(dim=1) if how == "last" else rollout(expected)
    torch.testing.assert_close(maps.flatten(2), weights[:, :3, 3:])


@torch.no_grad()
def test_latents_of_timm(tiny_timm):
    visual = timm_model("map", "vit_base_patch16_siglip_224").visual
    images = torch.randn(2, 3, 48, 48)
    pool, features = visual.trunk.attn_pool, visual.features(images)
    q = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    k = pool.kv(features).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
    expected = (q @ k.transpose(2, 3) / pool.head_dim**0.5).softmax(dim=-1).mean(dim=1)
    maps = token_attention(visual, images)
    assert maps.shape == (2, 3, 3, 3)
    torch.testing.assert_close(maps.flatten(2), expected)
    *blocks, _ = tower_attention(visual, images)
    torch.testing.assert_close(token_attention(visual, images, "rollout").flatten(2), expected @ rollout(blocks))


def test_rollout_worked_by_hand():
    first = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])  # one image, one head, two tokens
    second = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    # half residual: [[.5, .5], [.25, .75]], then the identity
    torch.testing.assert_close(rollout([first, second])[0], torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    # the other order multiplies from the left: [[0, 1], [0, 1]] averaged with the identity = [[.5, .5], [0, 1]]
    other = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    expected = torch.tensor([[0.5, 0.5], [0.0, 1.0]]) @ torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    torch.testing.assert_close(rollout([first, other])[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["last", "rollout"])
@pytest.mark.parametrize("place", [(0, 1), (1, 0), (1, 1)])
def test_a_planted_patch_is_found_where_it_is(tiny_model, how, place):
    """One patch differs; the last block's queries are all alike and point at what makes its key differ."""
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, mixture_tokens=3, pooling="text", pool_heads=2)
    visual = model.eval().visual
    visual.positional_embedding.zero_()
    row, column = place
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 3.0
    *_, last = visual.transformer.resblocks
    inputs = []
    last.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    visual(image)
    patches = inputs[0][0, 3:]  # [4, W]
    odd = 2 * row + column
    rest = [i for i in range(4) if i != odd]
    width = patches.shape[1]
    last.attn.in_proj_weight[: 2 * width].zero_()
    last.attn.in_proj_weight[width : 2 * width] = torch.eye(width)
    last.attn.in_proj_bias.zero_()
    last.attn.in_proj_bias[:width] = 20 * (patches[odd] - patches[rest].mean(dim=0))
    maps = token_attention(visual, image, how)[0]
    for token in maps:
        assert divmod(int(token.argmax()), 2) == place


def test_a_tower_without_attention_is_refused(model, images):
    visual = copy.deepcopy(model.visual)
    visual.transformer.resblocks = torch.nn.ModuleList()
    with pytest.raises(UserError, match="--attention none"):
        token_attention(visual, images)


@torch.no_grad()
def test_a_mixture_heads_latents_look_at_the_backbones_features(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(BACKBONE_MODEL))
    model = llip.create_model_and_transforms(str(tmp_path / "m.json"), mixture_tokens=3, pool_heads=4)[0].eval()
    attention, seen = model.visual.head.blocks[-1].attn, []
    torch.nn.init.normal_(attention.qkv.weight, std=0.5)
    attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.randn(2, 3, 64, 64)
    maps = token_attention(model.visual, images)
    queries, keys, _ = attention.qkv(seen[0]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [B, A, N, 8] each
    expected = (queries @ keys.transpose(-2, -1) / 8**0.5).softmax(-1).mean(1)[:, :3, 3:]
    torch.testing.assert_close(maps.flatten(2), expected)
    assert maps.shape == token_attention(model.visual, images, "rollout").shape == (2, 3, 2, 2)
