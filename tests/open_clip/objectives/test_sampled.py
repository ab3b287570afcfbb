"""The texts that are drawn, and the loss over them against its equation in float64."""

import pytest
import torch
import torch.nn.functional as F

from llip.open_clip.objectives.losses import sigmoid_loss
from llip.open_clip.objectives.matches import Matches
from llip.open_clip.objectives.sampled import draw_texts, sampled_sigmoid_loss


def test_an_image_meets_its_own_texts_and_one_of_each_other_image():
    torch.manual_seed(0)
    matches = Matches(images=4, texts=12 * 3, captions=3, offset=4)
    counts = torch.zeros(4, 12, 3)
    for _ in range(600):
        drawn = draw_texts(matches, torch.device("cpu")).unflatten(1, (12, 3))
        counts += drawn
        for image in range(4):
            per_image = drawn[image].sum(dim=1).tolist()
            assert per_image == [3 if other == 4 + image else 1 for other in range(12)]
    others = torch.stack([counts[image, other] for image in range(4) for other in range(12) if other != 4 + image])
    assert (others / 600 - 1 / 3).abs().max() < 5 * (2 / 9 / 600) ** 0.5  # five standard errors of a fair draw


def test_masked_texts_are_met_by_no_one():
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, True, False, False])
    drawn = draw_texts(Matches(3, 6, 2, 0, mask), torch.device("cpu"))
    assert drawn[:, [1, 4, 5]].sum() == 0
    assert drawn[:, 0].all()  # the only text of image 0
    assert drawn[1, 2:4].all()


@pytest.mark.parametrize("processes", [1, 3])
def test_loss_and_gradients_are_those_of_the_equation(processes):
    images, captions = 4, 3
    everyone = processes * images
    torch.manual_seed(0)
    scores = torch.rand(everyone, everyone * captions, dtype=torch.float64).mul_(2).sub_(1).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -3.0))
    ours, met = [], []
    for rank in range(processes):
        matches = Matches(images, everyone * captions, captions, rank * images)
        state = torch.get_rng_state()
        met.append(draw_texts(matches, scores.device))
        torch.set_rng_state(state)
        ours.append(sampled_sigmoid_loss(scores[rank * images : (rank + 1) * images], matches, scale, bias))
    owners = torch.arange(everyone * captions) // captions
    signs = torch.where(owners == torch.arange(everyone)[:, None], 1.0, -1.0)
    pairs = -F.logsigmoid(signs * (scale * scores + bias))
    expected = pairs[torch.cat(met)].sum() / (everyone + captions - 1)
    mean = torch.stack(ours).mean()  # as DDP averages
    torch.testing.assert_close(mean, expected)
    leaves = (scores, scale, bias)
    for computed, gradient in zip(
        torch.autograd.grad(mean, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(computed, gradient)


def test_with_one_caption_it_is_the_sigmoid_loss():
    torch.manual_seed(0)
    scores, scale, bias = torch.randn(4, 12), torch.tensor(5.0), torch.tensor(-2.0)
    matches = Matches(4, 12, 1, 4)
    expected = sigmoid_loss(scores, matches, scale, bias)
    torch.testing.assert_close(sampled_sigmoid_loss(scores, matches, scale, bias), expected)
