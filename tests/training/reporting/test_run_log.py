"""A run's records on a disk that fills up and has room again, and beside jobs that write evaluations."""

import contextlib
import fcntl
import functools
import json
import logging
import subprocess
import sys
import threading
import time

import pytest

from llip.configs import Config
from llip.training.reporting.data_report import DataCounts, DataReport
from llip.training.reporting.run_log import RunLog, log, start_logging


def config(**changes) -> Config:
    return Config(name="run", train_data="pairs.tar", train_num_samples=1000, **{"report_to": (), **changes})


def open_log(folder, step=0, **changes) -> RunLog:
    return RunLog(folder, config(**changes), step, DataReport(["pairs"], DataCounts([0]), 0))


@pytest.fixture
def said():
    """What is logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB, and two functions: one fills it to the last byte, one makes room again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a disk here")
    filler = folder / "filler"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    yield folder, fill, filler.unlink
    start_logging(None)
    subprocess.run(["umount", "-l", folder], check=True)


def whole_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_that_do_not_fit_are_lost_and_said(tmp_path, said):
    run_log = open_log(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "evals.jsonl").symlink_to("/dev/full")
    for step in (1, 2):
        run_log.metrics({"step": step, "loss": 0.5})
        run_log.evaluation(step, "here", {"top1": 0.25})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "evals.jsonl").unlink()
    run_log.metrics({"step": 3, "loss": 0.5})
    run_log.evaluation(3, "here", {"top1": 0.25})
    assert whole_lines(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]
    assert whole_lines(tmp_path / "evals.jsonl") == [{"step": 3, "task": "here", "values": {"top1": 0.25}}]
    assert [line.split("/")[-1].split(":")[0] for line in said] == [
        "metrics.jsonl cannot be written",
        "evals.jsonl cannot be written",
        "metrics.jsonl can be written again; 2 records are lost",
        "evals.jsonl can be written again; 2 records are lost",
    ]


def test_a_disk_that_fills_up_and_has_room_again(small_disk, capfd):
    folder, fill, make_room = small_disk
    start_logging(folder)
    run_log = open_log(folder)
    run_log.metrics({"step": 1, "loss": 0.5})
    fill()
    for step in range(2, 400):  # more than what is left of the file's last page
        run_log.metrics({"step": step, "loss": 0.5})
        log.info("step %d", step)
    make_room()
    run_log.metrics({"step": 400, "loss": 0.5})
    steps = [record["step"] for record in whole_lines(folder / "metrics.jsonl")]
    assert steps == [*range(1, len(steps)), 400]
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "Logging error" not in printed
    assert printed.count("metrics.jsonl cannot be written: [Errno 28]") == 1
    assert printed.count("log.txt cannot be written: [Errno 28]") == 1
    assert f"{400 - len(steps)} records are lost" in printed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_curves_go_on_when_there_is_room_again(small_disk, said, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils import tensorboard

    folder, fill, make_room = small_disk
    monkeypatch.setattr(tensorboard, "SummaryWriter", functools.partial(tensorboard.SummaryWriter, flush_secs=0))
    run_log = open_log(folder, report_to=("tensorboard",))
    run_log.metrics({"step": 1, "loss": 1.0})
    time.sleep(0.2)  # until its thread has written
    fill()
    for step in range(2, 300):
        run_log.metrics({"step": step, **{f"value{index}": 1.0 for index in range(8)}})
    files = len(list((folder / "tensorboard").iterdir()))
    assert files == 1, "each try leaves a file"
    assert sum("tensorboard cannot be written" in line for line in said) == 1
    make_room()
    run_log.metrics({"step": 300, "loss": 3.0})
    run_log.close()
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (300, 3.0)]
    assert any("tensorboard can be written again" in line for line in said)


def test_a_terminal_that_takes_nothing_does_not_end_a_run(tmp_path, monkeypatch):
    start_logging(tmp_path)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        log.info("a line")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    start_logging(None)
    assert "a line" in (tmp_path / "log.txt").read_text()


def test_the_tasks_of_a_step_that_are_done(tmp_path):
    run_log = open_log(tmp_path)
    assert run_log.evaluated_tasks(5) == set()
    run_log.evaluation(5, "here", {"top1": 0.25})
    run_log.evaluation(5, "there", {"top1": 0.25})
    run_log.evaluation(10, "here", {"top1": 0.25})
    with open(tmp_path / "evals.jsonl", "a") as file:
        file.write('{"step": 5, "task": "third", "val')  # its process was killed
    assert run_log.evaluated_tasks(5) == {"here", "there"}
    assert run_log.evaluated_tasks(10) == {"here"}
    assert run_log.evaluated_tasks(15) == set()
    assert [bool(run_log.evaluated_tasks(step)) for step in (5, 15)] == [True, False]
    assert open_log(None).evaluated_tasks(5) == set()


def test_evaluations_that_cannot_be_read_are_done_again(tmp_path, said):
    run_log = open_log(tmp_path)
    run_log.evaluation(5, "here", {"top1": 0.25})
    (tmp_path / ".evals.lock").unlink()
    (tmp_path / ".evals.lock").mkdir()
    assert run_log.evaluated_tasks(5) == set()
    assert len(said) == 1
    assert ".evals.lock" in said[0]


def test_a_start_waits_for_the_job_that_writes(tmp_path):
    """A line that a job of the run before is about to add lies after the step, so the start must see it."""
    path, held = tmp_path / "evals.jsonl", threading.Event()
    path.write_text('{"step": 5, "task": "here", "values": {}}\n')

    def job():
        with open(tmp_path / ".evals.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            time.sleep(0.3)
            with open(path, "a") as file:
                file.write('{"step": 9, "task": "here", "values": {}}\n')

    thread = threading.Thread(target=job)
    thread.start()
    assert held.wait(10)
    open_log(tmp_path, step=5)
    thread.join()
    assert [record["step"] for record in whole_lines(path)] == [5]
