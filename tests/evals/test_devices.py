"""Devices by name, and the processes of an evaluation: those that fail, and those that are killed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evals import mc
from evals.devices import ProcessKilledError, choose_devices, launch
from llip.clipeval.eval_config import EvalConfig
from llip.errors import RunError, UserError
from tests.clipeval.fakes import FakeModel, write_catalog, write_wds
from tests.evals.helpers import load_fake, results_of

pytestmark = pytest.mark.usefixtures("forked")


class Deadly(FakeModel):
    """Is killed, as by the system when memory runs out, where it meets the class name KILL."""

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        if any("KILL" in bytes(row).decode() for row in tokens.tolist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_text(tokens)


def load_deadly(config: EvalConfig) -> FakeModel:
    return Deadly(seed=int(Path(config.checkpoint_path).read_text()))


def load_killed(config: EvalConfig) -> FakeModel:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return load_fake(config)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None) == ["cuda:0", "cuda:1"]
    assert choose_devices(["cuda:1"]) == ["cuda:1"]
    assert choose_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    for names, words in [
        (["cuda:2"], "--devices cuda:2: this machine has cpu, cuda:0, cuda:1; for instance --devices cuda:0 cuda:1"),
        (["cuda:0,cuda:1"], "separate devices by spaces: --devices cuda:0 cuda:1"),
        (["0"], "Did you mean 'cuda:0'"),
        (["CPU"], "Did you mean 'cpu'"),
        (["cuda:0", "cuda:0"], "more than once"),
        (["cuda:0", "cpu"], "not both"),
        (["gpu"], "--devices gpu"),
    ]:
        with pytest.raises(UserError, match=words):
            choose_devices(names)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_devices(None) == ["cpu"]
    with pytest.raises(UserError, match="--devices cuda:0: this machine has no CUDA device; write --devices cpu"):
        choose_devices(["cuda:0"])


def test_a_process_killed_at_its_exit_costs_no_result(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_at_exit(worker, devices, *arguments) -> None:
        launch(worker, devices, *arguments)
        raise ProcessKilledError("process 0 (cpu) was killed by SIGKILL")

    monkeypatch.setattr(mc, "launch", killed_at_exit)
    assert mc.run(config, ["cpu"], load_fake) == 0


def _one_fails_the_other_waits(device: str, pids: Path) -> None:
    (pids / str(os.getpid())).touch()
    if dist.get_rank() == 1:
        raise UserError("the second process has no data")
    dist.barrier()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the second process has no data"):
        launch(_one_fails_the_other_waits, ["cpu", "cpu"], tmp_path)
    for pid in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)


def test_a_task_that_gets_a_process_killed_fails_and_the_others_run(
    config: EvalConfig, capfd: pytest.CaptureFixture
) -> None:
    folder = Path(config.catalog_name).parent
    entries = json.loads(Path(config.catalog_name).read_text())
    write_wds(folder / "deadly", [0, 1, 2], ["ant", "KILL", "cow"])
    deadly = {"type": "webdataset", "path": "deadly"}
    write_catalog(Path(config.catalog_name), {"wds": entries["wds"], "deadly": deadly, "pairs": entries["pairs"]})
    assert mc.run(config, ["cpu", "cpu"], load_deadly) == 1
    tasks = results_of(config)["tasks"]
    assert [name for name in tasks if tasks[name].get("error")] == ["deadly"]
    assert tasks["wds"]["n"] == 30
    assert tasks["pairs"]["n"] == 6
    printed = capfd.readouterr().err
    assert "error: deadly: process 1 (cpu) was killed by SIGKILL (often: out of memory)" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_process_killed_before_any_task_ends_the_evaluation(config: EvalConfig) -> None:
    with pytest.raises(RunError, match=r"process 1 \(cpu\) was killed by SIGKILL .* before the first task"):
        mc.run(config, ["cpu", "cpu"], load_killed)
    assert not Path(config.output_dir, "results.json").exists()


def _fails(device: str) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.slow
def test_a_bug_in_a_process_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"in _fails\n(.*\n)*ZeroDivisionError: a bug"):
        launch(_fails, ["cpu", "cpu"])
