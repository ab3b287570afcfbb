"""Scores of one text by projecting the text: the dense form's numbers, and only where they apply."""

import pytest
import torch

from llip.open_clip.pooling import create_pooling, unit_norm
from llip.tools.search.one_text import applies_to, scores_of_one_text


def random_pooling(tokens, width, heads):
    torch.manual_seed(0)
    pooling = create_pooling("text", tokens, width, heads, 2.0)
    for parameter in pooling.parameters():
        parameter.data += torch.randn_like(parameter) * width**-0.5
    return pooling


@pytest.mark.parametrize(("tokens", "width", "heads"), [(5, 32, 4), (1, 16, 2), (12, 24, 1)])
def test_scores_are_those_of_the_dense_form(tokens, width, heads):
    pooling = random_pooling(tokens, width, heads).double()
    h = 3 * torch.randn(7, tokens, width, dtype=torch.float64)
    h[0] = 0  # degenerate tokens stay finite
    for t in unit_norm(torch.randn(3, width, dtype=torch.float64)):
        expected = pooling.contextualize(h, t[None])[:, 0] @ t
        torch.testing.assert_close(scores_of_one_text(pooling, h, t), expected, rtol=0, atol=1e-9)


def test_texts_attend_to_patches_alone():
    pooling = random_pooling(9, 32, 4)
    pooling.first_pair_token = 3
    h, t = torch.randn(5, 9, 32), unit_norm(torch.randn(1, 32))
    torch.testing.assert_close(scores_of_one_text(pooling, h, t[0]), pooling.scores(h, t)[:, 0])


def test_applies_to_plain_text_conditioning_alone():
    assert applies_to(random_pooling(3, 16, 2))
    assert not applies_to(create_pooling("mean", 3, 16, 2, 1.0))
    with_bias = random_pooling(3, 16, 2)
    with_bias.v_proj = torch.nn.Linear(16, 16)
    assert not applies_to(with_bias)
    with_buffer = random_pooling(3, 16, 2)
    with_buffer.register_buffer("shift", torch.zeros(3))
    assert not applies_to(with_buffer)
