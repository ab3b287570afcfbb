"""Poolings and exact scores against dense float64 arithmetic written out from the method's equations."""

import pytest
import torch

from llip.open_clip.pooling import create_pooling, unit_norm
from llip.open_clip.similarity import gram_is_cheaper, pairwise_scores


def reference_features(pooling, h, t):
    """z_ij by METHOD's equations, one head and one pair at a time, in float64."""
    h, t = h.double(), t.double()
    w_q, w_k, w_v, w_o = (getattr(pooling, f"{name}_proj").weight.double() for name in ("q", "k", "v", "out"))
    heads, width = pooling.heads, h.shape[-1]
    size = width // heads
    z = torch.empty(len(h), len(t), width, dtype=torch.float64)
    for i in range(len(h)):
        keys = (h[i] / h[i].norm(dim=-1, keepdim=True)) * width**0.5 @ w_k.T  # [K, D]
        values = h[i] @ w_v.T
        for j in range(len(t)):
            query = w_q @ (t[j] * width**0.5)
            parts = []
            for m in range(heads):
                part = slice(m * size, (m + 1) * size)
                weights = (keys[:, part] @ query[part] / pooling.temperature).softmax(dim=0)
                parts.append(weights @ values[:, part])
            mixed = w_o @ torch.cat(parts)
            z[i, j] = mixed / mixed.norm()
    return z


def make(images=3, texts=7, tokens=5, width=24, heads=4, temperature=2.0, seed=0):
    torch.manual_seed(seed)
    pooling = create_pooling("text", tokens, width, heads, temperature)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    return pooling, torch.randn(images, tokens, width), unit_norm(torch.randn(texts, width))


SHAPES = [
    {},
    {"tokens": 1},
    {"images": 1},
    {"tokens": 8, "width": 64, "heads": 2},  # MK below D
    {"tokens": 8, "width": 16, "heads": 2},  # MK = D
    {"tokens": 16, "width": 16, "heads": 4},  # MK above D
]


@pytest.mark.parametrize("shape", SHAPES)
def test_contextualize_is_the_method(shape):
    pooling, h, t = make(**shape)
    torch.testing.assert_close(
        pooling.contextualize(h, t).double(), reference_features(pooling, h, t), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_gram", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 100])
def test_scores_are_the_reference_whatever_the_tile(shape, use_gram, tile):
    pooling, h, t = make(**shape)
    scores = pairwise_scores(
        pooling.keys(h), pooling.values(h), pooling.queries(t), pooling.targets(t), t, pooling.out_proj.weight,
        tile_texts=tile, use_gram=use_gram,
    )  # fmt: skip
    expected = torch.einsum("ijd,jd->ij", reference_features(pooling, h, t), t.double())
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_gram", [True, False])
@pytest.mark.parametrize("budget", [0, 1 << 30])  # recomputed in backward, kept
def test_gradients_are_the_reference(use_gram, budget):
    pooling, h, _t = make(images=3, texts=9, tokens=4)
    raw = torch.randn(9, 24)
    upstream = torch.randn(3, 9)

    def gradients(score, dtype):
        pooling.zero_grad()
        tokens, texts = (x.detach().to(dtype).clone().requires_grad_() for x in (h, raw))
        score(tokens, texts / texts.norm(dim=-1, keepdim=True)).mul(upstream.to(dtype)).sum().backward()
        return [tokens.grad, texts.grad, *(p.grad for p in pooling.parameters())]

    def tiled(h, t):
        return pairwise_scores(
            pooling.keys(h), pooling.values(h), pooling.queries(t), pooling.targets(t), t, pooling.out_proj.weight,
            memory_budget=budget, tile_texts=4, use_gram=use_gram,
        )  # fmt: skip

    def dense(h, t):
        return torch.einsum("ijd,jd->ij", reference_features_graph(pooling, h, t), t)

    found = gradients(tiled, torch.float32)
    pooling.double()
    expected = gradients(dense, torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max() + 1e-9


def reference_features_graph(pooling, h, t):
    """The same equations in einsum, differentiable."""
    width, heads = h.shape[-1], pooling.heads
    split = lambda x: x.unflatten(-1, (heads, -1))  # noqa: E731
    q = split(t * width**0.5 @ pooling.q_proj.weight.T)
    k = split(h / h.norm(dim=-1, keepdim=True) * width**0.5 @ pooling.k_proj.weight.T)
    v = split(h @ pooling.v_proj.weight.T)
    weights = (torch.einsum("jmd,ikmd->ijmk", q, k) / pooling.temperature).softmax(dim=-1)
    z = torch.einsum("ijmk,ikmd->ijmd", weights, v).flatten(2) @ pooling.out_proj.weight.T
    return z / z.norm(dim=-1, keepdim=True)


def test_gradcheck():
    pooling, h, t = make(images=2, texts=3, tokens=3, width=8, heads=2)
    pooling.double()
    inputs = (h.double().requires_grad_(), t.double().requires_grad_())
    for budget in (0, 1 << 30):
        assert torch.autograd.gradcheck(lambda h, t, budget=budget: pooling.scores(h, t, budget), inputs)


def test_one_mixture_token_ignores_the_text():
    pooling, h, t = make(tokens=1)
    z = pooling.contextualize(h, t)
    torch.testing.assert_close(z, z[:, :1].expand_as(z), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["first", "mean", "learned", "text"])
def test_permuting_texts_permutes_columns(kind):
    _, h, t = make()
    pooling = create_pooling(kind, 5, 24, 4, 2.0)
    order = torch.randperm(len(t))
    torch.testing.assert_close(pooling.scores(h, t)[:, order], pooling.scores(h, t[order]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mean", "learned", "text"])
def test_permuting_mixture_tokens_changes_nothing(kind):
    _, h, t = make()
    pooling = create_pooling(kind, 5, 24, 4, 2.0)
    torch.testing.assert_close(pooling.scores(h[:, torch.randperm(5)], t), pooling.scores(h, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["first", "mean", "learned", "text"])
def test_every_pooling_answers_the_same_calls(kind):
    _, h, t = make()
    pooling = create_pooling(kind, 5, 24, 4, 2.0)
    z, weights = pooling.contextualize(h, t), pooling.mixture_weights(h, t)
    assert z.shape == (3, 7, 24)
    assert weights.shape[:2] == (3, 7)
    assert weights.shape[3] == 5
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 7))
    torch.testing.assert_close(pooling.scores(h, t), torch.einsum("ijd,jd->ij", z, t), atol=1e-5, rtol=0)


def test_text_conditioning_starts_as_a_mixture_of_the_tokens():
    """With identities as W_V and W_O and all tokens alike, the feature is the token."""
    pooling = create_pooling("text", 5, 24, 4, 2.0)
    token = torch.randn(1, 1, 24)
    t = unit_norm(torch.randn(3, 24))
    z = pooling.contextualize(token.expand(1, 5, -1), t)
    torch.testing.assert_close(z, unit_norm(token).expand(1, 3, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 5, 24), torch.ones(2, 5, 24)])
@pytest.mark.parametrize("kind", ["first", "mean", "text"])
def test_degenerate_tokens_are_finite(kind, tokens):
    pooling = create_pooling(kind, 5, 24, 4, 2.0)
    h = tokens.clone().requires_grad_()
    scores = pooling.scores(h, unit_norm(torch.randn(7, 24)))
    scores.sum().backward()
    assert scores.isfinite().all()
    assert h.grad.isfinite().all()


def test_cheaper_form_by_count():
    assert gram_is_cheaper(256, 32_768, tokens=32, heads=8, width=512)
    assert gram_is_cheaper(128, 32_768, tokens=64, heads=8, width=1280)
    assert not gram_is_cheaper(256, 32_768, tokens=128, heads=8, width=512)  # (MK)^2 is four times D^2
    assert not gram_is_cheaper(256, 8, tokens=32, heads=8, width=512)  # too few texts for a Gram matrix
