"""Which processes a run gets: never fewer than asked for, and the way out spelled out."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest

from llip.configs import Config
from llip.errors import UserError
from llip.training.distributed import launch
from llip.training.distributed.slurm_environment import adopt_slurm


@pytest.fixture
def gpus(monkeypatch):
    """Set how many GPUs this machine seems to have."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
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
            "asks for 8 GPUs on this machine, found 2. Use nodes=1 ngpus=2 (global batch 20 instead of 80; "
            "accum_freq=4 restores it)",
        ),
        (0, {"ngpus": 2}, "found 0. Use nodes=1 ngpus=1 device=cpu"),
        (0, {"device": "cuda"}, "found 0"),
        (8, {"ngpus": 8, "nodes": 4}, "found one machine with 8 GPUs and no multi-node launch"),
        (3, {"ngpus": 4, "batch_size": 10}, "accum_freq=1 gives 30"),
        (0, {"ngpus": 1, "device": "cuda", "batch_size": 8}, "Use nodes=1 ngpus=1 device=cpu (same global batch)"),
        (0, {"ngpus": 1000, "device": "cpu"}, "asks for 1000 processes on this machine, which has 2 cores"),
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


@pytest.mark.parametrize(("rank", "world_size"), [("abc", "2"), ("0", "x"), ("5", "1"), ("-1", "2"), ("", "1")])
def test_a_launcher_whose_variables_are_wrong_is_refused(gpus, monkeypatch, capsys, rank, world_size):
    gpus(0)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match="RANK < WORLD_SIZE") as raised:
        launch.resolve_device(Config(ngpus=1, device="cpu"))
    assert launch.report_error(raised.value) == 2


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
        adopt_slurm()
        found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": str(12_000 + 123 * 16),  # sixteen for each job: one for each attempt
    }
    assert "RANK" not in os.environ


def test_an_incomplete_step_of_slurm_is_one_message(gpus, monkeypatch):
    gpus(0)
    for name, value in {"PROCID": "0", "NTASKS": "2", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match=r"SLURM_NTASKS=2 SLURM_PROCID=0.*start them with srun, or unset SLURM_PROCID"):
        adopt_slurm()


class Failed:
    """Stands for PyTorch's ChildFailedError: exit codes by rank, and who failed first."""

    def __init__(self, first, codes):
        self.failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
        self.first = first

    def get_first_failure(self):
        return self.first, self.failures[self.first]


@pytest.mark.parametrize(
    ("first", "codes", "reports", "message", "code"),
    [
        (1, {0: 3, 1: -9}, {0: ("lost 1", 3)}, "process 1 ended: killed by SIGKILL (often: out of memory). lost 1", 3),
        (0, {0: 3, 1: -9}, {0: ("stuck", 3)}, "stuck", 3),  # the launcher killed the other
        (1, {0: 2, 1: 2}, {0: ("no such file", 2), 1: ("no such file", 2)}, "no such file", 2),
        (1, {0: -15, 1: 1}, {}, "process 1 ended: exit code 1", 1),  # its traceback is on the screen
        (0, {0: -15}, {}, "process 0 ended: killed by SIGTERM", 3),
        (2, {0: 3, 2: -9}, {0: ("lost 2", 3), 1: ("wrong", 2)}, "wrong", 2),
    ],
)
def test_one_message_for_all_failures(tmp_path, monkeypatch, capsys, first, codes, reports, message, code):
    monkeypatch.setenv(launch.REPORTS_FOLDER, str(tmp_path))
    for rank, (text, exit_code) in reports.items():
        monkeypatch.setenv("RANK", str(rank))
        error = UserError(text)
        error.exit_code = exit_code
        assert launch.report_error(error) == exit_code
    assert launch._report_failure(launch._failures(tmp_path, Failed(first, codes))) == code
    assert capsys.readouterr().err == f"\nerror: {message}\n"
