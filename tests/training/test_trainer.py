"""What the loop does when a step goes wrong."""

from types import SimpleNamespace

import pytest
import torch

from llip.errors import UserError
from llip.open_clip.pooling import create_pooling
from llip.run_configs.quickstart import llip_quickstart
from llip.training.trainer import Trainer


def trainer(pooling="text", **changes):
    """A trainer with just what speaks of memory."""
    made = Trainer.__new__(Trainer)
    made.config = llip_quickstart().replace(**changes)
    made.state = SimpleNamespace(step=7)
    made.processes = SimpleNamespace(rank=1)
    head = create_pooling(pooling, 8, 128, 8, 5.0)
    budget = None if made.config.score_memory is None else int(made.config.score_memory * 2**30)
    made.task = SimpleNamespace(
        score_plan=lambda images: head.score_plan(images, images, 8, on_cpu=True, memory_budget=budget)
    )
    return made


@pytest.mark.parametrize(
    "shortage",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")],
)  # fmt: skip
def test_a_shortage_of_memory_names_the_prediction_and_the_settings(shortage):
    with pytest.raises(UserError) as raised, trainer(batch_size=2048, score_memory=0.25)._explained_shortage():
        raise shortage
    message = str(raised.value)
    for part in ("step 7", "process 1", "predicted peak", "score_memory below 0.25", "batch_size", "accum_freq"):
        assert part in message
    assert str(shortage) in message


def test_a_shortage_without_conditioning_does_not_blame_the_scores():
    with pytest.raises(UserError) as raised, trainer("first")._explained_shortage():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "score_memory" not in str(raised.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), trainer()._explained_shortage():
        raise RuntimeError("shape mismatch")
