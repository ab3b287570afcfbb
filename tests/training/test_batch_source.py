"""Stop requests and failures while a process waits for data: what was trained is saved, and the run ends at once."""

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks.kill_resume import Launched, logged_steps, wait_for
from llip.errors import EXIT_RUN, EXIT_STOPPED, RunError
from llip.main import train
from llip.open_clip.weights.load import read_checkpoint
from llip.training.batch_source import BatchSource
from llip.training.checkpoints.records import read_records
from tests.helpers import config_file, tiny_run, write_pairs
from tests.training.distributed.test_survival import ranks

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)


class Stall:
    """Shards of 48 pairs each (more than are read ahead) that commands deliver; one of them may stall."""

    def __init__(self, folder, shards):
        write_pairs(folder, 48 * shards, 48)
        self.file, script = folder / "stalled", folder / "deliver.sh"
        script.write_text(f"while grep -qs $1 {self.file}; do sleep 0.1; done; cat {folder}/$1.tar\n")
        self.train_data = f"pipe:sh {script} {{00000..{shards - 1:05d}}}"

    def begin(self, shard):
        self.file.write_text(shard)

    def end(self):
        self.file.unlink()


class SignalWhenIdle:
    """A callback of `train` that signals this process when no step has come for a second."""

    def __init__(self):
        self.timer, self.sent = None, 0.0

    def __call__(self, result):
        if self.timer is not None:
            self.timer.cancel()
        self.timer = threading.Timer(1.0, self.send)
        self.timer.start()

    def send(self):
        self.sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)


def losses(config):
    return [record["loss"] for record in read_records(config.folder / "metrics.jsonl")]


def last_shard(config):
    """Return the shard from which the last sample of the first epoch came, and of the first step another."""
    lines = [json.loads(line) for line in (config.folder / "sample_ids" / "process_0.jsonl").read_text().splitlines()]
    ids = [each for line in lines if line["step"] <= config.steps_per_epoch for each in line["ids"]]
    shard = ids[-1].split(".tar")[0].split(" ")[-1]
    assert all(shard not in each for line in lines if line["step"] == 1 for each in line["ids"])
    return shard


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_does_not_wait_for_data(tmp_path, workers):
    """The run ends at once, saved, and continues as if nothing had been: also inside an accumulated step."""
    stall = Stall(tmp_path / "pairs", 4)
    config = tiny_run(
        tmp_path, train_data=stall.train_data, workers=workers, shuffle_buffer=1, batch_size=16, accum_freq=2,
        train_num_samples=192, epochs=2, patch_dropout=0.5, log_sample_ids=True,
    )  # fmt: skip
    straight = config.replace(name="straight")
    train(straight, "cpu")
    stall.begin(last_shard(straight))
    idle = SignalWhenIdle()
    assert not train(config, "cpu", on_step=idle)
    assert time.monotonic() - idle.sent < 3.0
    steps = len(losses(config))
    assert 0 < steps < config.steps_per_epoch
    assert read_checkpoint(config.folder / "checkpoints" / "latest.pt")["step"] == steps
    stall.end()
    assert train(config, "cpu")
    assert losses(config) == losses(straight)


def start(config, folder):
    """Start the config's processes by their launcher; return what knows them."""
    command = [sys.executable, "-m", "llip.main", config_file(folder / f"{config.name}.py", config)]
    return Launched(command, folder / f"{config.name}.txt")


@pytest.mark.slow  # starts two processes three times
def test_two_processes_stop_together_when_one_waits_for_data(tmp_path):
    """The signal reaches the other one alone, which a collective blocks."""
    stall = Stall(tmp_path / "pairs", 4)
    config = tiny_run(
        tmp_path, train_data=stall.train_data, workers=1, shuffle_buffer=1, ngpus=2, batch_size=16,
        train_num_samples=192, epochs=2, patch_dropout=0.5, log_sample_ids=True,
    )  # fmt: skip
    straight = config.replace(name="straight")
    assert start(straight, tmp_path).finish() == 0
    stall.begin(last_shard(straight))
    launched = start(config, tmp_path)
    assert wait_for(lambda: logged_steps(config.folder) > 0, 60)
    last, seen = time.monotonic(), 0
    while time.monotonic() - last < 1.5:
        if logged_steps(config.folder) > seen:
            last, seen = time.monotonic(), logged_steps(config.folder)
        time.sleep(0.1)
    os.kill(ranks(launched)[1], signal.SIGTERM)
    sent = time.monotonic()
    assert launched.finish() == EXIT_STOPPED
    assert time.monotonic() - sent < 10
    steps = len(losses(config))
    assert 0 < steps < config.steps_per_epoch
    stall.end()
    assert start(config, tmp_path).finish() == 0
    assert losses(config) == losses(straight)


TRANSFORM = """
import itertools, multiprocessing, os, resource, signal
calls = itertools.count()

def fail(caption, seed):
    if next(calls) == 40 and multiprocessing.parent_process() and os.environ.get("RANK", "1") == "1":
        {how}
    return caption
"""
HOW = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "no thread": "multiprocessing.reduction.ForkingPickler.dumps = no_thread",
    "no memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))",
}
HOW["no thread"] = """
        def dumps(*_):
            raise RuntimeError("can't start new thread")
        multiprocessing.reduction.ForkingPickler.dumps = dumps"""


def failing_run(folder, how, **changes):
    """A run of which a worker fails in the third batch."""
    (folder / "transform.py").write_text(TRANSFORM.format(how=HOW[how]))
    return tiny_run(folder, workers=1, caption_transform=f"{folder}/transform.py:fail", **changes)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("killed", r"a worker died: killed by SIGKILL \(often: out of memory\)"),
        ("no thread", "a worker could not hand over a batch: RuntimeError: can't start new thread"),
        ("no memory", "a worker (?:ran out of memory|could not hand over a batch|died)"),
    ],
)
def test_a_worker_that_fails_ends_the_run_at_once_with_a_checkpoint(tmp_path, how, cause):
    """Its exit code is that of a run that failed, not of a mistake; the run then resumes where it ended."""
    config = failing_run(tmp_path, how)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=rf"data: {cause}.*after step (\d); the newest checkpoint is of step \1"
    ) as raised:
        train(config, "cpu")
    assert time.monotonic() - began < 15
    assert raised.value.exit_code == EXIT_RUN
    (tmp_path / "transform.py").write_text("def fail(caption, seed):\n    return caption\n")
    assert train(config, "cpu")
    assert re.search(rf"resumed at step [12] of {config.total_steps}", (config.folder / "log.txt").read_text())


@pytest.mark.slow
def test_a_worker_that_fails_while_its_batch_is_received_is_the_cause():
    """It ends with code 0, so that the loader does not report it."""
    failure = SimpleNamespace(read=lambda: "a worker could not hand over a batch: no memory")
    source = SimpleNamespace(_workers=set(), dataset=SimpleNamespace(failure=failure))
    error = BatchSource._explain(source, ConnectionResetError(104, "Connection reset by peer"))
    assert isinstance(error, RunError)
    assert "a worker could not hand over a batch: no memory. Try fewer workers" in str(error)


def test_a_batch_that_is_lost_is_its_workers_death():
    """Though the system has not reported the death yet."""
    with multiprocessing.Pipe()[0] as sentinel:  # whose other end is closed
        failure, worker = SimpleNamespace(read=lambda: ""), SimpleNamespace(sentinel=sentinel, exitcode=None)
        source = SimpleNamespace(_workers=[worker], dataset=SimpleNamespace(failure=failure))
        error = BatchSource._explain(source, ConnectionResetError(104, "Connection reset by peer"))
    assert isinstance(error, RunError)
    assert "a worker died: [Errno 104] Connection reset by peer. Try fewer workers" in str(error)


@pytest.mark.slow  # starts two processes
def test_a_worker_of_one_process_that_fails_ends_all_with_a_checkpoint(tmp_path):
    config = failing_run(tmp_path, "killed", ngpus=2, train_num_samples=64)
    launched = start(config, tmp_path)
    assert launched.finish() == EXIT_RUN
    errors = [line for line in (tmp_path / "run.txt").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"data: a worker died.*after step (\d); the newest checkpoint is of step \1", errors[0])
