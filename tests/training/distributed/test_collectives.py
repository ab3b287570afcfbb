"""Collectives of the objectives, with the names that the installed torch wants."""

import warnings

import torch

from llip.system.processes import Processes
from llip.training.distributed.collectives import combine_logsumexp, gather_texts


def _gather(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    texts = torch.full((2, 3), float(rank), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gathered = gather_texts(texts, Processes(rank, world_size))
        (gathered * (rank + 1)).sum().backward()
        combined = combine_logsumexp(torch.tensor([float(rank), -float(rank)]))
    return gathered.detach(), texts.grad, combined


def test_gathered_texts_and_their_gradients(pool):
    for gathered, grad, combined in pool.run(_gather, 2):
        assert gathered.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert grad.tolist() == [[3.0] * 3] * 2  # of both processes: 1 + 2
        expected = torch.logsumexp(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), 0)
        torch.testing.assert_close(combined, expected)
