"""The measures against numbers worked by hand, and alarms on tokens that are made to collapse."""

import math

import numpy as np
import pytest
import torch

import llip
from llip.open_clip.mixture_alarms import find_alarms
from llip.open_clip.mixture_statistics import (
    effective_number,
    effective_rank,
    entropy,
    grid_variances,
    mixture_measures,
    share,
    spectrum,
    token_similarity,
    token_usage,
    weight_text_share,
)


def test_entropy_by_hand():
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(entropy(weights), torch.tensor([0.0, math.log(2), math.log(4)]))
    torch.testing.assert_close(effective_number(weights), torch.tensor([1.0, 2.0, 4.0]))


def test_usage_by_hand():
    # 1 image, 2 texts, 2 heads, 2 tokens: (1 + 0.5 + 0 + 0.5) / 4
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])
    torch.testing.assert_close(token_usage(weights), torch.tensor([0.5, 0.5]))
    weights = torch.tensor([[[[0.9, 0.1]], [[0.7, 0.3]]]])
    torch.testing.assert_close(token_usage(weights), torch.tensor([0.8, 0.2]))


def test_variances_by_hand():
    # images are rows, texts are columns; values 0 2 / 4 10
    values = torch.tensor([[0.0, 2.0], [4.0, 10.0]])[..., None]
    over_texts, over_images, total = grid_variances(values)
    assert over_texts == (1 + 9) / 2  # ((2-0)/2)^2 and ((10-4)/2)^2
    assert over_images == (4 + 16) / 2
    assert total == ((0 - 4) ** 2 + (2 - 4) ** 2 + 0 + 36) / 4
    assert share(over_texts, over_images).item() == pytest.approx(5 / 15)
    assert share(torch.zeros(()), torch.zeros(())) == 0


def test_text_share_of_weights():
    by_text = torch.tensor([[0.9, 0.1], [0.1, 0.9]])[None, :, None].expand(3, 2, 1, 2)  # same for every image
    assert weight_text_share(by_text).item() == pytest.approx(1)
    assert weight_text_share(by_text.transpose(0, 1)).item() == pytest.approx(0)
    assert weight_text_share(torch.full((3, 2, 1, 2), 0.5)) == 0


def test_token_similarity_by_hand():
    h = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])  # cosines 0, r, r with r = 1 / sqrt 2
    assert token_similarity(h).item() == pytest.approx(2 / 3 / math.sqrt(2))
    assert token_similarity(torch.ones(2, 4, 3)).item() == pytest.approx(1)
    assert token_similarity(h[:, :1]) == 0


def test_spectrum_against_the_covariance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 4)) * [3, 2, 1, 0] + 7
    eigenvalues = np.linalg.eigvalsh(np.cov(features.T, bias=True))[::-1]
    found = spectrum(torch.from_numpy(features))
    np.testing.assert_allclose(found.square().numpy(), eigenvalues.clip(0), atol=1e-10)


def test_effective_rank_by_hand():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, mixture_tokens=4, pool_heads=2)
    return model.eval()


def features(images=40, tokens=4, texts=50, width=16):
    rng = torch.Generator().manual_seed(3)
    t = torch.randn(texts, width, generator=rng)
    return 3 * torch.randn(images, tokens, width, generator=rng), t / t.norm(dim=1, keepdim=True)


def test_batch_measures_agree_with_numpy(model):
    h, t = features()
    found = mixture_measures(model, h, t)
    with torch.no_grad():  # the first 32 of each
        z = model.contextualize(h[:32], t[:32]).double().numpy()
        weights = model.mixture_weights(h[:32], t[:32]).double().numpy()
    usage = weights.mean(axis=(0, 1, 2))
    over_texts, over_images = z.var(axis=1).sum(-1).mean(), z.var(axis=0).sum(-1).mean()
    assert found["usage_max"] == pytest.approx(usage.max(), rel=1e-4)
    assert found["usage_effective"] == pytest.approx(np.exp(-(usage * np.log(usage)).sum()), rel=1e-4)
    per_pair = np.exp(-(weights * np.log(weights)).sum(-1))
    assert found["effective_per_pair"] == pytest.approx(per_pair.mean(), rel=1e-4)
    assert found["z_variance_over_texts"] == pytest.approx(over_texts, rel=1e-4)
    assert found["z_variance_over_images"] == pytest.approx(over_images, rel=1e-4)
    assert found["z_text_share"] == pytest.approx(over_texts / (over_texts + over_images), rel=1e-4)
    assert all(type(value) is float for value in found.values())


def test_batch_measures_leave_no_graph_and_work_under_autocast(model):
    h, t = features()
    expected = mixture_measures(model, h, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixture_measures(model, h.requires_grad_(), t)
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_alarm_for_tokens_that_differ(model):
    h, t = features()
    assert find_alarms(mixture_measures(model, h, t), 4, text_conditioned=True) == []


def test_copies_raise_an_alarm(model):
    h, t = features()
    copies = h[:, :1].expand(-1, 4, -1) + 1e-3 * h
    found = find_alarms(mixture_measures(model, copies, t), 4, text_conditioned=True)
    assert any("nearly copies" in alarm for alarm in found)
    assert any("image features hardly change" in alarm for alarm in found)


def test_one_token_with_all_the_weight_raises_an_alarm(model):
    h, t = features()
    weight = torch.zeros(16, 16)
    model.pooling.q_proj.weight.data.copy_(weight)  # no query: all tokens weigh the same for every text
    found = find_alarms(mixture_measures(model, h, t), 4, text_conditioned=True)
    assert any("weights over tokens hardly change" in alarm for alarm in found)
    measures = {"usage_effective": 1.02, "token_similarity": 0.2, "weight_text_share": 0.5, "z_text_share": 0.5}
    (alarm,) = find_alarms(measures, 64, text_conditioned=True)
    assert "1.0 of 64" in alarm
    assert "a larger softmax_temperature spreads" in alarm
    (alarm,) = find_alarms(measures, 64, text_conditioned=True, has_temperature=False)
    assert "softmax_temperature" not in alarm
    assert find_alarms(measures, 64, text_conditioned=False) == []  # learned weights may choose one token


def test_flat_features_raise_an_alarm():
    measures = {"usage_effective": 4.0, "token_similarity": 0.2, "weight_text_share": 0.5, "z_text_share": 0.5}
    assert find_alarms(measures | {"rank": 60.0}, 4, text_conditioned=True, width=512) == []
    (alarm,) = find_alarms(measures | {"rank": 3.0}, 4, text_conditioned=True, width=512)
    assert "effective rank 3.0" in alarm


def test_models_without_choice_raise_no_alarm(tiny_model):
    for options in ({"mixture_tokens": 1}, {"mixture_tokens": 4, "pooling": "mean"}):
        model, _, _ = llip.create_model_and_transforms(tiny_model, pool_heads=2, **options)
        h, t = features(tokens=options["mixture_tokens"])
        found = mixture_measures(model.eval(), h, t)
        assert found["z_text_share"] == pytest.approx(0, abs=1e-6)
        assert find_alarms(found, options["mixture_tokens"], options.get("pooling") != "mean") == []
