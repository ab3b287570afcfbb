"""How a task of a training job ends: SLURM queues it again exactly when it was warned or preempted."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llip.main
from llip.cluster import tasks
from llip.cluster.evaluation import EvaluationJobs
from llip.cluster.tasks import TrainTask
from llip.errors import EXIT_STOPPED
from llip.training.distributed.signals import stop_on_signals


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """Stand in submitit's place: note its handler's calls, and leave as it does on task 0."""
    calls: list[int] = []

    def handler(number: int, _: object) -> None:
        calls.append(number)
        raise SystemExit(-1)

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, handler)
    monkeypatch.setattr(tasks, "join_job", lambda: None)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.chdir(tmp_path)
    yield calls
    for number, old in before.items():
        signal.signal(number, old)


def stopped_by(*numbers: int) -> Callable[[list[str], object], int]:
    """Return a training run that is signalled, handles it as runs do, and saves."""

    def main(_: list[str], __: object) -> int:
        with stop_on_signals() as stop:
            for number in numbers:
                os.kill(os.getpid(), number)
            stop.look()
            assert bool(stop) == bool(numbers)
        return EXIT_STOPPED

    return main


def answer_of_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, main: Callable[[list[str], object], int]) -> int:
    monkeypatch.setattr(llip.main, "main", main)
    try:
        return TrainTask(["some_config"], str(folder))()
    except SystemExit as left:
        return left.code


def test_a_warned_run_is_queued_again_after_it_has_saved(requeued, monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, stopped_by(signal.SIGUSR2)) == -1
    assert requeued == [signal.SIGUSR2]


def test_other_tasks_leave_it_to_the_first(requeued, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert run(monkeypatch, tmp_path, stopped_by(signal.SIGUSR2)) == 0
    assert requeued == []


def test_a_cancelled_run_is_not_queued_again(requeued, monkeypatch, tmp_path):
    answer_of_scontrol(monkeypatch, tmp_path, "JobId=5 JobState=COMPLETING PreemptTime=None")
    assert run(monkeypatch, tmp_path, stopped_by(signal.SIGTERM)) == EXIT_STOPPED
    assert requeued == []


def test_a_preempted_run_is_queued_again(requeued, monkeypatch, tmp_path):
    answer_of_scontrol(monkeypatch, tmp_path, "JobId=5 JobState=RUNNING PreemptTime=2026-01-01T00:00:00")
    assert run(monkeypatch, tmp_path, stopped_by(signal.SIGTERM)) == -1
    assert len(requeued) == 1


def test_a_scontrol_that_does_not_answer_queues_nothing(requeued, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(monkeypatch, tmp_path, stopped_by(signal.SIGTERM)) == EXIT_STOPPED


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_other_codes_become_the_jobs(requeued, monkeypatch, tmp_path, code):
    assert run(monkeypatch, tmp_path, lambda words, submit: code) == code
    assert requeued == []


def test_the_run_gets_its_words_its_folder_and_its_evaluation_jobs(requeued, monkeypatch, tmp_path):
    seen = []

    def main(words: list[str], submit_evaluation: object) -> int:
        seen.append((words, Path.cwd(), submit_evaluation))
        return 0

    monkeypatch.setattr(llip.main, "main", main)
    (tmp_path / "submitted_from").mkdir()
    jobs = EvaluationJobs(Path("slurm"), {"nodes": 1}, 3)
    task = pickle.loads(pickle.dumps(TrainTask(["a", "b=1"], str(tmp_path / "submitted_from"), jobs)))
    task()
    assert hasattr(task, "checkpoint"), "submitit requeues no other task"
    task.__submitit_checkpoint__().function()  # what submitit runs after a requeue
    assert seen == [(["a", "b=1"], tmp_path / "submitted_from", jobs)] * 2
    assert task.__submitit_checkpoint__().function.arguments == ["a", "b=1"]
