"""What a step costs and agrees on, and what the loop does when it goes wrong."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llip.errors import UserError
from llip.main import train
from llip.run_configs.quickstart import llip_quickstart
from llip.system.processes import Processes
from llip.training.trainer import Trainer
from tests.helpers import tiny_run


class ScalarReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host (`item`, `float`, `bool`)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"accum_freq": 2, "batch_size": 8, "grad_clip": 1.0, "ema_decay": 0.5}])
def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch, changes):
    """One all-reduce, read at once, says all that the processes must agree on; nothing else is read or broadcast."""
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    config = tiny_run(tmp_path, log_steps=0, save_minutes=60, **changes)
    agree, waits, counts = Processes.all_reduce_max, [], []

    def counting(processes, values):
        waits.append("all_reduce_max")
        return agree(processes, values)

    monkeypatch.setattr(Processes, "all_reduce_max", counting)
    monkeypatch.setattr(Processes, "broadcast_object", lambda processes, value: waits.append("broadcast") or value)
    with ScalarReads() as reads:
        train(config, "cpu", on_step=lambda result: counts.append((len(waits), reads.count)))
    pairs = itertools.pairwise(counts[:-1])  # the last step saves
    per_step = [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]
    assert per_step == [(1, 0)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("main_is_due", [True, False])
def test_the_main_process_alone_decides_by_its_clock(pool, tmp_path, main_is_due):
    config = tiny_run(tmp_path, batch_size=8, ngpus=2, save_minutes=60)
    assert pool.run(steps_saved_by_time, 2, config, main_is_due) == [[1, 2, 3, 4, 5, 6] if main_is_due else [6]] * 2


def steps_saved_by_time(rank, count, config, main_is_due):
    """Train with one process whose clock says that a checkpoint is due; return the steps that this process saved."""
    from contextlib import contextmanager

    from llip.training.checkpoints.saver import Saver
    from llip.training.distributed import processes as distributed
    from llip.training.reporting import figures

    @contextmanager
    def joined(config, device):
        yield Processes(rank, count, torch.device("cpu"))

    distributed.join_processes = joined  # the pool has joined them already
    figures.draw_curves = lambda folder: None
    saved, save = [], Saver.save
    Saver.is_due_by_time = lambda self: (rank == 0) == main_is_due
    Saver.save = lambda self, last=False: (saved.append(self.state.step), save(self, last))
    train(config, "cpu")
    return saved


def trainer(pooling="text", **changes):
    """A trainer with just what speaks of memory."""
    made = Trainer.__new__(Trainer)
    made.config = llip_quickstart().replace(pooling=pooling, **changes)
    made.state = SimpleNamespace(step=7)
    made.processes = SimpleNamespace(rank=1, device=torch.device("cpu"))
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
