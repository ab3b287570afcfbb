"""Both objectives against open_clip's own, and the closed-form gradient of the softmax against autograd."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from llip.open_clip.loss import sigmoid_loss, softmax_loss
from llip.open_clip.pooling import create_pooling, unit_norm


def make(batch=6, width=8):
    torch.manual_seed(0)
    h = torch.randn(batch, 1, width, requires_grad=True)
    t = torch.randn(batch, width, requires_grad=True)
    return h, t, torch.tensor(7.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)


def compare(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours, inputs, retain_graph=True)
    expected = torch.autograd.grad(theirs, inputs, retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().item(), rtol=0)


def test_sigmoid_is_siglip():
    h, t, scale, bias = make()
    scores = create_pooling("first", 1, 8, 1, 1.0).scores(h, unit_norm(t))
    theirs = SigLipLoss()(F.normalize(h[:, 0], dim=-1), F.normalize(t, dim=-1), scale, bias)
    compare(sigmoid_loss(scores, 0, scale, bias), theirs, (h, t, scale, bias))


def test_softmax_is_clip():
    h, t, scale, _ = make()
    scores = create_pooling("first", 1, 8, 1, 1.0).scores(h, unit_norm(t))
    theirs = ClipLoss()(F.normalize(h[:, 0], dim=-1), F.normalize(t, dim=-1), scale)
    compare(softmax_loss(scores, 0, scale), theirs, (h, t, scale))


@pytest.mark.parametrize("scores", [torch.zeros(4, 4), torch.eye(4) * 2 - 1, torch.ones(4, 4)])
def test_large_scales_stay_finite(scores):
    scores = scores.clone().requires_grad_()
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    for loss in (sigmoid_loss(scores, 0, scale, bias), softmax_loss(scores, 0, scale)):
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_offset_must_leave_room_for_the_own_texts():
    with pytest.raises(AssertionError, match="offset 3"):
        sigmoid_loss(torch.zeros(2, 4), 3, torch.tensor(1.0), torch.tensor(0.0))
