"""FLAIR's pooling against torch's own MultiheadAttention with a zero key, and patches beside mixture tokens."""

import functools
from typing import get_args

import pytest
import torch
from torch import nn

import llip
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from llip.open_clip.flair import FlairPooling
from llip.open_clip.pooling import unit_norm
from llip.open_clip.scores import similarity
from llip.open_clip.scores.plan import Form

WIDTH, HEADS, TOKENS = 16, 4, 9


def pooling():
    torch.manual_seed(0)
    head = FlairPooling(WIDTH, HEADS).double()
    for parameter in head.parameters():  # away from unit gains and zero biases
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def features(images=3, texts=5, tokens=TOKENS):
    torch.manual_seed(1)
    h = torch.randn(images, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    t = unit_norm(torch.randn(texts, WIDTH, dtype=torch.float64)).requires_grad_()
    return h, t


def reference(head, h, t):
    """Return z [B, T, D] and weights [B, T, M, P + 1] by torch's module, image by image."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_zero_attn=True).double()
    z, weights = [], []
    for tokens in h:
        inputs = head.ln_q(t * WIDTH**0.5)[None], head.ln_k(tokens)[None], head.ln_v(tokens)[None]
        mixed, by_head = torch.func.functional_call(
            attention, dict(head.attn.named_parameters()), inputs, {"average_attn_weights": False}
        )
        z.append(nn.functional.normalize(mixed[0], dim=-1))
        weights.append(by_head[0].transpose(0, 1))
    return torch.stack(z), torch.stack(weights)


def test_features_and_weights_are_those_of_torch_s_attention():
    head, (h, t) = pooling(), features()
    z, weights = reference(head, h, t)
    torch.testing.assert_close(head.contextualize(h, t), z)
    torch.testing.assert_close(head.mixture_weights(h, t), weights[..., :-1])
    assert weights[..., -1].min() > 0  # some of the weight is nowhere


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("shape", [(3, 5, TOKENS), (2, 300, TOKENS), (1, 1, 1)])
def test_scores_and_all_gradients_are_those_of_torch_s_attention(monkeypatch, form, shape):
    forced = functools.partial(similarity.pairwise_scores, form=form, tile=(2, 7))
    monkeypatch.setattr(similarity, "pairwise_scores", forced)
    head, (h, t) = pooling(), features(*shape)
    leaves = [h, t, *head.parameters()]
    expected = torch.einsum("btd,td->bt", reference(head, h, t)[0], t)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, upstream)
    for budget in (None, 1000):  # tiles kept, and computed again
        scores = head.scores(h, t, budget)
        torch.testing.assert_close(scores, expected)
        for computed, gradient in zip(torch.autograd.grad(scores, leaves, upstream), gradients, strict=True):
            torch.testing.assert_close(computed, gradient, atol=1e-9, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(head.scores(h, t), expected)


def test_a_caption_may_attend_to_nothing():
    head, (h, t) = pooling(), features()
    with torch.no_grad():
        head.attn.in_proj_bias[:WIDTH] = 30.0  # every query is one large constant,
        head.attn.in_proj_bias[WIDTH : 2 * WIDTH] = -30.0  # and every key its opposite
    weights = head.mixture_weights(h, t)
    assert weights.sum(dim=-1).max() < 1e-6
    nothing = nn.functional.normalize(head.attn.out_proj.bias, dim=0)
    torch.testing.assert_close(head.contextualize(h, t), nothing.expand(3, 5, -1))
    torch.testing.assert_close(head.scores(h, t), (t @ nothing).expand(3, -1))


def test_the_text_free_feature_is_the_first_token():
    head, (h, t) = pooling(), features()
    torch.testing.assert_close(head.global_feature(h), nn.functional.normalize(h[:, 0], dim=-1))
    torch.testing.assert_close(head.global_scores(h, t), nn.functional.normalize(h[:, 0], dim=-1) @ t.T)


def build(model, **options):
    torch.manual_seed(0)
    return llip.create_model_and_transforms(model, pool_heads=4, **options)[0].eval()


@torch.no_grad()
def test_patches_follow_the_mixture_tokens(tiny_model):
    images = torch.randn(2, 3, 32, 32)
    alone = build(tiny_model, mixture_tokens=3)
    patches = alone.visual.grid_size[0] * alone.visual.grid_size[1]
    expected = alone.encode_image(images)
    for which, attended in (("both", 3 + patches), ("patches", patches)):
        model = build(tiny_model, mixture_tokens=3, pair_tokens=which)
        h = model.encode_image(images)
        assert h.shape[1] == 3 + patches
        torch.testing.assert_close(h[:, :3], expected)
        t = model.encode_text(model.tokenizer(["a cat", "two dogs"]))
        weights = model.mixture_weights(h, t)
        assert weights.shape == (2, 2, 4, attended)
        torch.testing.assert_close(model.similarity(h, t), torch.einsum("btd,td->bt", model.contextualize(h, t), t))
        # by hand: the outputs of OpenCLIP's blocks, normed and projected
        visual = model.visual
        outputs = visual.transformer(visual.embed(images))[:, 3:]
        torch.testing.assert_close(h[:, 3:], visual.ln_post(outputs) @ visual.proj)
    moved = h.clone()
    moved[:, :3] = 0  # only the patches are attended to
    torch.testing.assert_close(model.similarity(moved, t), model.similarity(h, t))


def test_patch_dropout_leaves_fewer_patches(tiny_model):
    config = Config(model=tiny_model, pair_tokens="both", pooling="flair", pool_heads=4, patch_dropout=0.5)
    model = create_model(model_spec(config)).train()
    patches = model.visual.grid_size[0] * model.visual.grid_size[1]
    h = model.encode_image(torch.randn(2, 3, 32, 32))
    assert h.shape[1] == 1 + patches // 2
    t = model.encode_text(torch.ones(3, 12, dtype=torch.long))
    model.similarity(h, t).sum().backward()
    model.eval()
    assert model.encode_image(torch.randn(2, 3, 32, 32)).shape[1] == 1 + patches


@pytest.mark.parametrize("pooling", ["first", "mean", "learned"])
def test_text_free_poolings_take_no_patches(pooling):
    with pytest.raises(UserError, match=r"pair_tokens = 'patches'.*mixture tokens"):
        Config(pooling=pooling, pair_tokens="patches")
