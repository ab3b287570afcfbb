"""Bytes that the scores move, against counts by hand and against other counts of the published shapes."""

import pytest
import torch

from llip.config_search import search_config
from llip.tools.plan.score_bytes import ByteCounter, score_bytes


def test_what_an_operation_moves():
    x, y = torch.ones(8, 4), torch.ones(4)
    with ByteCounter() as counter:
        z = x.T.reshape(8, 4)  # a copy: 32 numbers in and out
    assert counter.total == 2 * 32 * 4
    with ByteCounter() as counter:
        z.add_(y)  # in place: z and y in, z out
        torch.empty_like(z)
        z[:2].to(torch.bfloat16)  # 8 numbers in, as many out at half the width
    assert counter.total == (32 + 4 + 32 + 0) * 4 + 8 * 4 + 8 * 2
    with ByteCounter() as counter:
        torch.mul(x, y, out=x.new_zeros(8, 4))  # zeros are written alone, and so is `out`
    assert counter.total == (32 + 32 + 4 + 32) * 4


@pytest.mark.parametrize(
    ("config", "gigabytes"),
    [("llip_b32_k32", 341), ("llip_b32_k64", 724), ("llip_b16_k32", 341), ("llip_l14_k32", 347), ("llip_G14_k64", 378)],
)
def test_eager_scores_of_published_shapes(config, gigabytes):
    assert score_bytes(search_config(config, ["score_kernel=eager"])) == pytest.approx(gigabytes * 1e9, rel=0.05)


@pytest.mark.slow
def test_more_images_move_more():
    config = search_config("llip_b16_k32", ["score_kernel=eager"])
    assert score_bytes(config.replace(nodes=4, accum_freq=4)) == pytest.approx(4 * score_bytes(config), rel=0.05)
    more = score_bytes(config.replace(nodes=1, accum_freq=16)) / score_bytes(config)
    assert 16 < more < 20  # the norms of all pairs exceed the budget, and are computed again
    assert score_bytes(config.replace(captions_per_image=4)) == pytest.approx(4 * score_bytes(config), rel=0.05)
    assert score_bytes(config.replace(pooling="mean")) == 0
    kept = config.replace(nodes=1, score_memory=8.0)  # tiles are not computed twice
    assert score_bytes(kept) < 0.8 * score_bytes(kept.replace(score_memory=4.0))
