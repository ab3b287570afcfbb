"""The ids of a run's samples: an interrupted run has used those of an uninterrupted one, in order."""

import signal
import subprocess
import sys
import time

import pytest

from llip.configs import Config
from llip.main import train
from llip.training.checkpoints import records
from llip.training.checkpoints.records import read_records
from llip.training.reporting.sample_log import SampleLog, cut_back_ids
from tests.helpers import write_pairs


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    return Config(
        name="straight", logs=str(tmp_path / "logs"), train_data=write_pairs(tmp_path / "pairs", 50, 8),
        train_num_samples=48, model=tiny_model, mixture_tokens=2, pool_heads=4, batch_size=4, accum_freq=2, epochs=8,
        lr=1e-4, warmup=2, precision="fp32", workers=2, log_steps=1, save_frequency=0, save_steps=7, report_to=(),
        shuffle_buffer=12, log_sample_ids=True, device="cpu",
    )  # fmt: skip


def used(config):
    return read_records(config.folder / "sample_ids" / "process_0.jsonl")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_killed_and_resumed_uses_the_same_samples(config, tmp_path):
    train(config, "cpu")
    assert [line["step"] for line in used(config)] == [step for step in range(1, 49) for _ in range(2)]
    ids = [name for line in used(config) for name in line["ids"]]
    assert len(ids) == 384
    assert len(set(ids)) == 50

    killed = config.replace(name="killed")
    file = tmp_path / "config.py"
    fields = ", ".join(f"{key}={value!r}" for key, value in vars(killed).items())
    file.write_text(f"from llip.configs import Config\ndef run():\n    return Config({fields})\n")
    metrics = killed.folder / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "llip.main", f"{file}:run"], stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 12):
            assert time.monotonic() < end, "the run does not get on"
            assert process.poll() is None, "the run has ended by itself"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert len(used(killed)) < 96
    time.sleep(2)  # its workers go after it, and hold its lock until then
    train(killed, "cpu")
    assert "resumed at step" in (killed.folder / "log.txt").read_text()
    assert used(killed) == used(config)
    last = read_records(killed.folder / "metrics.jsonl")[-1]
    assert (last["dataset_samples"], last["dropped_samples"]) == ([384], 0)


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(records.log, "warning", lambda text, *values: said.append(text % values))
    cut_back_ids(tmp_path, 0)
    log = SampleLog(tmp_path, 3)
    log.path.symlink_to("/dev/full")
    for step in (1, 2, 3):
        log.add(step, ["a"])
    log.path.unlink()
    log.add(4, ["b", "c"])
    assert read_records(tmp_path / "sample_ids" / "process_3.jsonl") == [{"step": 4, "ids": ["b", "c"]}]
    assert len(said) == 2
    assert "process_3.jsonl cannot be written: [Errno 28] No space left on device" in said[0]
    assert "3 records are lost" in said[1]
