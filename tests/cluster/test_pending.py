"""Weights put aside for jobs whose results come in at any time."""

import fcntl
from pathlib import Path

import pytest
import torch

import llip
from llip.clipeval.task_result import TaskResult
from llip.cluster.pending import add_evaluation, evaluate_saved, save_for_eval
from llip.configs import Config
from llip.open_clip.factory import create_model, model_spec
from llip.training.checkpoints import records
from tests.cluster.evaluated_run import evaluated_run, recorded


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return evaluated_run(tmp_path)


@pytest.fixture
def model(config: Config):
    torch.manual_seed(0)
    return create_model(model_spec(config)).eval()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def result(task: str = "here", value: float = 0.25) -> TaskResult:
    return TaskResult(task, "top1", {"top1": value}, n=6)


def test_what_is_put_aside_is_the_model_alone(config, model):
    weights = save_for_eval(config.folder, model, 5)
    loaded = llip.load_pretrained(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert "optimizer" not in torch.load(weights, weights_only=True)


def test_a_task_that_cannot_be_evaluated_fails_the_job_and_leaves_the_others(config, model, tmp_path, capfd):
    both = config.replace(evals=(str(tmp_path / "missing.yaml"), str(tmp_path / "here.yaml")))
    assert evaluate_saved(both, save_for_eval(config.folder, model, 5)) == 1
    assert [line["task"] for line in recorded(config)] == ["here"]
    assert "step 5, missing: " in capfd.readouterr().err


def test_going_back_takes_later_weights_away_and_leaves_earlier_ones(config, model):
    earlier, same, later = (save_for_eval(config.folder, model, step) for step in (5, 10, 15))
    again = save_for_eval(config.folder, model, 10)
    assert [path.exists() for path in (earlier, same, later, again)] == [True, False, False, True]
    assert again.name != same.name


def test_results_of_a_course_that_was_left_are_not_recorded(config, model):
    weights = save_for_eval(config.folder, model, 10)
    save_for_eval(config.folder, model, 5)
    assert not add_evaluation(config.folder, weights, 10, result())
    assert evaluate_saved(config, weights) == 0  # the job that comes too late ends in good order
    assert recorded(config) == []


def test_there_is_one_line_for_each_step_and_task(config, model):
    first, second = save_for_eval(config.folder, model, 5), save_for_eval(config.folder, model, 10)
    assert add_evaluation(config.folder, second, 10, result(value=0.25))  # jobs end in any order
    assert add_evaluation(config.folder, first, 5, result(value=0.5))
    assert add_evaluation(config.folder, first, 5, result("other", 0.125))
    assert add_evaluation(config.folder, first, 5, result(value=0.75))  # a job that was queued again
    found = {(line["step"], line["task"]): line["values"]["top1"] for line in recorded(config)}
    assert found == {(10, "here"): 0.25, (5, "other"): 0.125, (5, "here"): 0.75}
    assert len(recorded(config)) == 3


def test_records_that_stay_locked_do_not_hang(config, model, monkeypatch):
    monkeypatch.setattr(records, "RECORDS_PATIENCE", 0.2)
    weights = save_for_eval(config.folder, model, 5)
    with open(config.folder / ".evals.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"evals\.jsonl"):
            add_evaluation(config.folder, weights, 5, result())


@pytest.mark.parametrize("task", ["here", "other"])
def test_half_a_line_of_a_killed_job_does_not_spoil_the_next(config, model, task):
    weights = save_for_eval(config.folder, model, 5)
    add_evaluation(config.folder, weights, 5, result())
    with open(config.folder / "evals.jsonl", "a") as file:
        file.write('{"step": 5, "task": "th')
    assert add_evaluation(config.folder, weights, 5, result(task, 0.75))
    expected = {"here": 0.75} if task == "here" else {"here": 0.25, "other": 0.75}
    assert {line["task"]: line["values"]["top1"] for line in recorded(config)} == expected
