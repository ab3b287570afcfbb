"""The objectives against open_clip's own, and with several captions per image against their equations in float64."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from llip.open_clip.objectives.losses import sigmoid_loss, softmax_loss
from llip.open_clip.objectives.matches import Matches
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
    compare(sigmoid_loss(scores, Matches(*scores.shape), scale, bias), theirs, (h, t, scale, bias))


def test_softmax_is_clip():
    h, t, scale, _ = make()
    scores = create_pooling("first", 1, 8, 1, 1.0).scores(h, unit_norm(t))
    theirs = ClipLoss()(F.normalize(h[:, 0], dim=-1), F.normalize(t, dim=-1), scale)
    compare(softmax_loss(scores, Matches(*scores.shape), scale), theirs, (h, t, scale))


@pytest.mark.parametrize("scores", [torch.zeros(4, 4), torch.eye(4) * 2 - 1, torch.ones(4, 4)])
def test_large_scales_stay_finite(scores):
    scores = scores.clone().requires_grad_()
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    matches = Matches(*scores.shape)
    for loss in (sigmoid_loss(scores, matches, scale, bias), softmax_loss(scores, matches, scale)):
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.isfinite()
        assert gradient.isfinite().all()


# (images, captions, offset, processes), and the places that are empty, of processes * images * captions
CASES = [
    ((3, 1, 0, 1), []),
    ((3, 2, 0, 1), []),
    ((2, 3, 2, 3), []),
    ((3, 2, 0, 1), [1, 5]),
    ((2, 3, 2, 3), [1, 2, 8, 10, 17]),
    ((2, 3, 2, 3), [6, 7, 8]),  # an image without a text
]


def dense(scores, layout, mask, scale, bias, kind):
    """The global loss of all images [W B, T] from the equations, each text's owner written out."""
    images, captions, _, processes = layout
    owner = torch.tensor([image for image in range(processes * images) for _ in range(captions)])
    own = (owner == torch.arange(processes * images)[:, None]) & mask
    if kind == "sigmoid":
        y = own.double() * 2 - 1
        return -(F.logsigmoid(y * (scale * scores + bias))[:, mask]).sum() / mask.sum()
    logits = scale * scores
    of_texts = -torch.stack([logits[:, j].log_softmax(0)[owner[j]] for j in mask.nonzero()[:, 0]])
    of_images = []
    for row, positive in zip(logits, own, strict=True):
        log_p = row - row[mask].logsumexp(0)
        if not positive.any():
            of_images.append(torch.zeros((), dtype=torch.double))
        else:
            of_images.append(-log_p[positive].logsumexp(0) if kind == "in" else -log_p[positive].mean())
    return (of_texts.mean() + torch.stack(of_images).mean()) / 2


def ours(scores, layout, mask, scale, bias, kind):
    """The same from this project's losses, process by process."""
    images, captions, _, processes = layout
    columns = (scale * scores).logsumexp(0).detach()
    total = 0
    for rank in range(processes):
        part = scores[rank * images : (rank + 1) * images]
        matches = Matches(images, scores.shape[1], captions, rank * images, None if mask.all() else mask)
        if kind == "sigmoid":
            total = total + sigmoid_loss(part, matches, scale, bias)
        else:
            total = total + softmax_loss(part, matches, scale, lambda _: columns, inside=kind == "in")
    return total / processes


def draw(layout, empty):
    torch.manual_seed(1)
    images, captions, _, processes = layout
    texts = processes * images * captions
    scores = (torch.rand(processes * images, texts, dtype=torch.double) * 2 - 1).requires_grad_()
    mask = torch.ones(texts, dtype=torch.bool)
    mask[empty] = False
    scale = torch.tensor(5.0, dtype=torch.double, requires_grad=True)
    return scores, mask, scale, torch.tensor(-2.0, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("kind", ["sigmoid", "out", "in"])
@pytest.mark.parametrize(("layout", "empty"), CASES)
def test_several_captions_are_the_equations(layout, empty, kind):
    scores, mask, scale, bias = draw(layout, empty)
    inputs = (scores, scale, bias) if kind == "sigmoid" else (scores, scale)
    value, expected = ours(scores, layout, mask, scale, bias, kind), dense(scores, layout, mask, scale, bias, kind)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(value, inputs)
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-12)
    assert not found[0][:, empty].any()  # exactly


@pytest.mark.parametrize("kind", ["sigmoid", "out", "in"])
@pytest.mark.parametrize("empty", [[], [1, 5]])
def test_gradcheck(kind, empty):
    layout = (3, 2, 0, 1)
    scores, mask, scale, bias = draw(layout, empty)
    matches = Matches(3, 6, 2, 0, mask)

    def loss(scores, scale, bias):
        if kind == "sigmoid":
            return sigmoid_loss(scores, matches, scale, bias)
        return softmax_loss(scores, matches, scale, inside=kind == "in") + 0 * bias

    assert torch.autograd.gradcheck(loss, (scores, scale, bias))


def test_blocks_of_rows_change_nothing(monkeypatch):
    layout = (3, 2, 0, 1)
    scores, mask, scale, bias = draw(layout, [1, 5])
    matches = Matches(3, 6, 2, 0, mask)
    expected = torch.autograd.grad(softmax_loss(scores, matches, scale), scores)[0]
    value = sigmoid_loss(scores, matches, scale, bias)
    monkeypatch.setattr("llip.open_clip.objectives.losses._NUMBERS_AT_ONCE", 6)
    torch.testing.assert_close(torch.autograd.grad(softmax_loss(scores, matches, scale), scores)[0], expected)
    torch.testing.assert_close(sigmoid_loss(scores, matches, scale, bias), value)
