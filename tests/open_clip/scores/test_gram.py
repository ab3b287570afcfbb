"""Gram matrices of images and their gradients against the einsum of their definition, in float64."""

import pytest
import torch

from llip.open_clip.scores.gram import doubled_above_diagonal, image_gram, image_gram_backward, quadratic_form


@pytest.fixture(params=[(3, 2, 5, 4), (8, 2, 24, 4), (1, 3, 2, 6)], ids=["small", "several blocks", "one head"])
def case(request):
    """Return values [M, B, K, d], W_O^T W_O [D, D] and a symmetric gradient [B, MK, MK]."""
    heads, images, tokens, size = request.param
    torch.manual_seed(0)
    out = torch.randn(heads * size, heads * size, dtype=torch.float64)
    gradient = torch.randn(images, heads * tokens, heads * tokens, dtype=torch.float64)
    return torch.randn(heads, images, tokens, size, dtype=torch.float64), out.T @ out, gradient + gradient.mT


def reference(values, shared):
    heads, images, tokens, size = values.shape
    blocks = shared.view(heads, size, heads, size)
    gram = torch.einsum("mbkd,mdne,nble->bmknl", values, blocks, values)
    return gram.reshape(images, heads * tokens, heads * tokens)


def test_gram_matrices_and_their_gradients(case):
    values, shared, gradient = case
    values.requires_grad_(), shared.requires_grad_()
    expected = reference(values, shared)
    of_values, of_shared = torch.autograd.grad(expected, (values, shared), gradient)
    with torch.no_grad():
        torch.testing.assert_close(image_gram(values, shared), expected)
        lower = torch.ones_like(gradient[0]).tril(-1).bool()
        of_values_ours, of_shared_ours = image_gram_backward(values, shared, gradient.masked_fill(lower, float("nan")))
    torch.testing.assert_close(of_values_ours, of_values)
    torch.testing.assert_close(of_shared_ours + of_shared_ours.T, of_shared + of_shared.T)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_quadratic_form(rows):
    torch.manual_seed(0)
    matrix, x = torch.randn(2, rows, rows, dtype=torch.float64), torch.randn(2, rows, 5, dtype=torch.float64)
    matrix = matrix + matrix.mT
    expected = torch.einsum("nrt,nrs,nst->nt", x, matrix, x)
    torch.testing.assert_close(quadratic_form(doubled_above_diagonal(matrix), x), expected)
