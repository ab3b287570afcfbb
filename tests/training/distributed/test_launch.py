"""Which processes a run gets: never fewer than asked for, and the way out spelled out."""

import os
from unittest import mock

import pytest

from llip.configs import Config
from llip.errors import UserError
from llip.training.distributed import launch


@pytest.fixture
def gpus(monkeypatch):
    """Set how many GPUs this machine seems to have."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return lambda count: monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_auto_takes_the_gpus_where_there_are_some(gpus):
    gpus(2)
    assert launch.resolve_device(Config(ngpus=2)) == "cuda"
    assert launch.resolve_device(Config(ngpus=1)) == "cuda"
    assert launch.resolve_device(Config(ngpus=4, device="cpu")) == "cpu"
    gpus(0)
    assert launch.resolve_device(Config(ngpus=1)) == "cpu"


@pytest.mark.parametrize(
    ("found", "changes", "message"),
    [
        (
            2,
            {"ngpus": 8, "batch_size": 10},
            "asks for 8 GPUs on this machine, found 2. Type nodes=1 ngpus=2: global batch 20 in the place of 80; "
            "accum_freq=4 restores it",
        ),
        (0, {"ngpus": 2}, "found 0. Type nodes=1 ngpus=1 device=cpu"),
        (0, {"device": "cuda"}, "found 0"),
        (8, {"ngpus": 8, "nodes": 4}, "found one machine with 8 GPUs and no multi-node launch"),
        (3, {"ngpus": 4, "batch_size": 10}, "accum_freq=1 gives 30"),
    ],
)
def test_more_than_there_is_is_refused(gpus, found, changes, message):
    gpus(found)
    with pytest.raises(UserError) as error:
        launch.resolve_device(Config(**changes))
    assert message in str(error.value)


def test_a_launcher_with_another_number_of_processes_is_refused(gpus, monkeypatch):
    gpus(8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch.resolve_device(Config(nodes=2, ngpus=8)) == "cuda"
    with pytest.raises(UserError, match="asks for 1 nodes x 8 = 8 processes, and the launcher started 16"):
        launch.resolve_device(Config(ngpus=8))


def test_slurm_tasks_join_as_torchrun_would_have_them(gpus, tmp_path):
    gpus(0)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node7\necho node8\n")
    scontrol.chmod(0o755)
    slurm = {"PROCID": "3", "NTASKS": "4", "LOCALID": "1", "JOB_NODELIST": "node[7-8]", "JOB_ID": "123", "STEP_ID": "0"}
    slurm["JOB_NUM_NODES"] = "2"
    task = {f"SLURM_{name}": value for name, value in slurm.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with mock.patch.dict(os.environ, task):  # puts back what adopt_slurm sets, too
        os.environ.pop("SLURM_STEP_NUM_TASKS", None)
        launch.adopt_slurm()
        found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": str(12_000 + 123 * 16),  # sixteen for each job: one for each attempt
    }
    assert "RANK" not in os.environ
