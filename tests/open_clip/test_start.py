"""Where text-conditioned pooling starts from."""

import torch

from llip.open_clip.pooling import create_pooling, unit_norm


def test_a_text_starts_by_listening_to_the_token_that_points_its_way():
    torch.manual_seed(0)
    pooling = create_pooling("text", 4, 64, 4, 1.0)
    h = torch.randn(1, 4, 64)
    t = unit_norm(h[0])  # text j points where token j does
    weights = pooling.mixture_weights(h, t)[0].mean(dim=1)  # [T, K], over heads
    assert torch.equal(weights.argmax(dim=1), torch.arange(4))


def test_attention_logits_start_with_the_spread_of_a_default_initialisation():
    torch.manual_seed(0)
    pooling = create_pooling("text", 32, 512, 8, 1.0)
    h, t = torch.randn(16, 32, 512), unit_norm(torch.randn(64, 512))
    ours = torch.einsum("tmd,bmkd->btmk", pooling.queries(t), pooling.keys(h)).std()
    torch.nn.Linear.reset_parameters(pooling.q_proj)
    torch.nn.Linear.reset_parameters(pooling.k_proj)
    default = torch.einsum("tmd,bmkd->btmk", pooling.queries(t), pooling.keys(h)).std()
    assert 0.9 < ours / default < 1.1
