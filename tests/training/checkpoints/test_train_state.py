"""A run's mutable state."""

from types import SimpleNamespace

import pytest
import torch

from llip.data.position import DataPosition
from llip.errors import UserError
from llip.training.checkpoints.train_state import TrainState


def test_a_checkpoint_of_another_version_is_refused_in_words():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    state = TrainState(optimizer, torch.amp.GradScaler("cpu", enabled=False), DataPosition(0), None)
    old = {"processes": [{"position": {"workers": 2, "batches": 5, "cursors": [3, 2]}}]}
    with pytest.raises(UserError, match="another version of llip"):
        state.restore(old, SimpleNamespace(rank=0, world_size=1, is_main=True), None)
    assert state.step == 0
