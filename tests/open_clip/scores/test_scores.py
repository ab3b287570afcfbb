"""Poolings and exact scores against dense float64 arithmetic written out from the method's equations."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llip.open_clip.pooling import create_pooling, unit_norm
from llip.open_clip.scores.plan import cheapest_form, plan_scores
from llip.open_clip.scores.similarity import pairwise_scores

FORMS = ["image_gram", "shared_gram", "features"]


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


def scores_of(pooling, h, t, **options):
    return pairwise_scores(
        pooling.keys(h).transpose(0, 1), pooling.values(h).transpose(0, 1), t, pooling.q_proj.weight,
        pooling.out_proj.weight, h.shape[-1] ** 0.5 / pooling.temperature, **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (1, 100)])
def test_scores_are_the_reference_whatever_the_tile(shape, form, tile):
    pooling, h, t = make(**shape)
    expected = torch.einsum("ijd,jd->ij", reference_features(pooling, h, t), t.double())
    with torch.no_grad():
        torch.testing.assert_close(scores_of(pooling, h, t, form=form, tile=tile).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores_of(pooling, h, t, form=form, tile=tile).double(), expected, atol=1e-5, rtol=0)


def gradients(pooling, h, raw, upstream, score, dtype):
    """Return those of tokens, raw texts and head weights, computed in `dtype`."""
    pooling.to(dtype).zero_grad()
    tokens, texts = (x.detach().to(dtype).clone().requires_grad_() for x in (h, raw))
    score(tokens, texts / texts.norm(dim=-1, keepdim=True)).mul(upstream.to(dtype)).sum().backward()
    return [tokens.grad, texts.grad, *(p.grad.clone() for p in pooling.parameters())]


WIDE_SHAPES = [  # several blocks of the upper triangle: 64 rows each
    {"tokens": 24, "width": 64, "heads": 8, "images": 5, "texts": 33},  # MK three times D
    {"tokens": 5, "width": 160, "heads": 4, "images": 5, "texts": 33},  # D is no multiple of a block
]


@pytest.mark.parametrize("shape", SHAPES + WIDE_SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [0, 1 << 30])  # again in the backward pass with one image at a time, kept
@pytest.mark.parametrize("tile", [(2, 4), None])
def test_gradients_are_the_reference(shape, form, budget, tile):
    pooling, h, t = make(**shape)
    raw, upstream = torch.randn_like(t), torch.randn(len(h), len(t))

    def tiled(h, t):
        return scores_of(pooling, h, t, memory_budget=budget, form=form, tile=tile)

    def dense(h, t):
        return torch.einsum("ijd,jd->ij", reference_features_graph(pooling, h, t), t)

    found = gradients(pooling, h, raw, upstream, tiled, torch.float32)
    expected = gradients(pooling, h, raw, upstream, dense, torch.float64)
    scale = max(other.abs().max() for other in expected)
    for one, other in zip(found, expected, strict=True):  # with one token the gradient of W_Q is zero
        assert (one - other).abs().max() < 1e-5 * max(other.abs().max(), 1e-3 * scale)


def test_kept_tiles_may_be_used_twice():
    pooling, h, t = make(images=4, texts=40, tokens=4)
    h.requires_grad_()
    total = scores_of(pooling, h, t, form="image_gram", memory_budget=1 << 30).square().sum()
    first, second = (torch.autograd.grad(total, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [{"tokens": 8, "width": 64, "heads": 8}, {"tokens": 16, "width": 64, "heads": 8}])
def test_low_precision_is_as_exact_as_the_dense_form(dtype, form, shape):
    """Root mean square error against float64, over the scores and over every gradient."""
    pooling, h, t = make(images=16, texts=96, **shape)
    raw, upstream = torch.randn_like(t), torch.randn(len(h), len(t))

    def in_low_precision(score):
        def run(h, t):
            with torch.autocast("cpu", dtype=dtype):
                return score(h, t).float()

        return run

    def dense(h, t):
        return (pooling.contextualize(h, t) * t).sum(dim=-1)

    def tiled(h, t):
        return scores_of(pooling, h, t, form=form)

    def errors(score):
        pooling.float()
        with torch.no_grad():
            found = [in_low_precision(score)(h, t)]
        found += gradients(pooling, h, raw, upstream, in_low_precision(score), torch.float32)
        return [(one - other).square().mean().sqrt().item() for one, other in zip(found, exact, strict=True)]

    exact = [torch.einsum("ijd,jd->ij", reference_features(pooling, h, t), t.double())]
    exact += gradients(
        pooling, h, raw, upstream,
        lambda h, t: torch.einsum("ijd,jd->ij", reference_features_graph(pooling, h, t), t), torch.float64,
    )  # fmt: skip
    for name, ours, theirs in zip(["scores", "h", "t", *"qkvo"], errors(tiled), errors(dense), strict=True):
        assert ours <= 1.5 * theirs, f"{name}: {ours} against {theirs}"


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_gradcheck(form, budget):
    pooling, h, t = make(images=2, texts=3, tokens=3, width=8, heads=2)
    pooling.double()
    weights = [p.detach().clone().requires_grad_() for p in pooling.parameters()]

    def score(h, t, *weights):
        for parameter, weight in zip(("q_proj", "k_proj", "v_proj", "out_proj"), weights, strict=True):
            setattr(pooling, parameter, torch.nn.Linear(8, 8, bias=False))
            del getattr(pooling, parameter).weight
            getattr(pooling, parameter).weight = weight
        return scores_of(pooling, h, t, form=form, memory_budget=budget)

    assert torch.autograd.gradcheck(score, (h.double().requires_grad_(), t.double().requires_grad_(), *weights))


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


@pytest.mark.parametrize("kind", ["first", "mean", "learned", "text"])
def test_global_scores_are_inner_products_with_one_feature_per_image(kind):
    torch.manual_seed(0)
    pooling = create_pooling(kind, 4, 16, 2, 5.0)
    h, t = torch.randn(3, 4, 16), unit_norm(torch.randn(5, 16))
    if kind == "text":
        for parameter in pooling.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        mean = h.mean(dim=1) @ pooling.v_proj.weight.T @ pooling.out_proj.weight.T  # all tokens weigh the same
        expected = mean @ t.T / mean.norm(dim=-1, keepdim=True)
    else:
        expected = pooling.scores(h, t)
    torch.testing.assert_close(pooling.global_scores(h, t), expected)
    torch.testing.assert_close(pooling.global_feature(h).norm(dim=-1), torch.ones(3))


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


def saved_bytes(run):
    """Return the bytes of distinct storages that autograd keeps for the backward pass of `run()`."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storages.values())


def test_nothing_of_the_size_of_the_pairs_stays_beyond_the_budget():
    images, tokens, heads, width = 4, 8, 8, 64

    def kept(texts, budget):
        pooling, h, t = make(images, texts, tokens, width, heads)
        h.requires_grad_()
        return saved_bytes(lambda: scores_of(pooling, h, t, form="image_gram", memory_budget=budget))

    added = 4096 - 512
    assert kept(4096, 0) - kept(512, 0) <= added * width * 4  # the texts themselves
    assert kept(4096, 1 << 30) > added * images * tokens * heads * 4  # with room to spare, tiles stay


MEMORY_PROBE = """
import re, sys, torch
from llip.open_clip.pooling import create_pooling, unit_norm
torch.set_num_threads(1)
pooling = create_pooling("text", 16, 64, 8, 5.0)
h = torch.randn(8, 16, 64, requires_grad=True)
for texts in map(int, sys.argv[1:]):
    t = torch.empty(texts, 64).uniform_(-1, 1).requires_grad_()
    pooling.scores(h, t, memory_budget=1 << 24).sum().backward()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))  # of this process alone
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_peak_memory_hardly_grows_with_the_texts():
    command = [sys.executable, "-c", MEMORY_PROBE, "4096", "65536"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    peaks = dict(zip((4096, 65_536), map(int, done.stdout.split()), strict=True))
    added = 65_536 - 4096
    pairs = added * 8 * 4
    assert peaks[65_536] <= 1.1 * peaks[4096] + 4 * added * 64 * 4 + 3 * pairs
    assert 0.1 * peaks[4096] + 4 * added * 64 * 4 + 3 * pairs < pairs * 16 * 8  # B x T x MK would not pass


def test_plan_keeps_tiles_only_within_the_budget():
    shape = {"images": 64, "texts": 1024, "tokens": 32, "heads": 8, "width": 512, "training": True, "on_cpu": True}
    ample, tight = plan_scores(**shape, budget=1 << 30), plan_scores(**shape, budget=1 << 26)
    assert ample.keep
    assert not tight.keep
    assert tight.peak_bytes <= 1 << 26 < ample.peak_bytes <= 1 << 30
    assert not plan_scores(**{**shape, "training": False}, budget=1 << 30).keep


def test_plan_cuts_images_whose_gram_matrices_do_not_fit():
    plan = plan_scores(32_768, 32_768, 32, 8, 512, training=True, on_cpu=False)
    assert plan.form == "image_gram"
    assert plan.block_images < 32_768
    assert plan.peak_bytes <= plan.budget


def test_cheapest_form_by_shape():
    def form(images, texts, tokens, width, training=True):
        return cheapest_form(images, texts, tokens, 8, width, training)

    assert form(256, 32_768, 32, 512) == "image_gram"
    assert form(128, 32_768, 64, 1280) == "image_gram"
    assert form(256, 32_768, 128, 512) == "shared_gram"  # (MK)^2 is four times D^2
    assert form(256, 64, 32, 512) == "shared_gram"  # too few texts for a Gram matrix of each image
    assert form(8, 8, 32, 512) == "features"
    assert form(1, 1_000_000, 32, 512) != "features"  # would not be bounded
