"""Evaluation during training: by the run itself, or by jobs that it submits."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llip.cluster import evaluation
from llip.cluster.evaluation import EvaluationTask
from llip.cluster.pending import evaluate_saved, save_for_eval
from llip.cluster.tasks import EVALUATION_JOBS
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from llip.system.processes import Processes
from llip.training.evaluation import online_evaluation
from tests.cluster.evaluated_run import evaluated_run, recorded

ALONE = Processes(0, 1, torch.device("cpu"))
NOTHING_YET = SimpleNamespace(evaluated_tasks=lambda step: set())


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return evaluated_run(tmp_path)


@pytest.fixture
def model(config: Config):
    torch.manual_seed(0)
    return create_model(model_spec(config)).eval()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", EVALUATION_JOBS):
        monkeypatch.delenv(name, raising=False)


def in_process(config: Config, model) -> list[tuple]:
    """Return what a run outside a job records."""
    found: list[tuple] = []
    log = SimpleNamespace(evaluation=lambda *record: found.append(record), evaluated_tasks=lambda step: set())
    evaluate = online_evaluation(config, log, ALONE)
    evaluate(model, 5, never)
    return found


def test_no_evaluation_where_none_is_asked_for(config):
    assert online_evaluation(config.replace(eval_steps=0), None, ALONE) is None
    assert online_evaluation(config.replace(evals=()), None, ALONE) is None


def test_a_job_records_what_the_run_would_have(config, model):
    ((step, task, values),) = in_process(config, model)
    assert (step, task, set(values)) == (5, "here", {"top1"})
    weights = save_for_eval(config.folder, model, 5)
    assert evaluate_saved(config, weights) == 0
    assert recorded(config) == [{"step": 5, "task": "here", "values": values}]
    assert not weights.exists()


@pytest.fixture
def in_a_job(monkeypatch) -> list[EvaluationTask]:
    """Pretend to be a training job; SLURM takes every evaluation."""
    submitted: list[EvaluationTask] = []
    options = {"logs": "slurm", "parameters": {"nodes": 1, "ntasks_per_node": 2}, "max_timeouts": 3}
    monkeypatch.setenv(EVALUATION_JOBS, json.dumps(options))

    class Request:
        def __init__(self, logs, parameters, tasks, max_timeouts):
            assert (logs, parameters, max_timeouts) == (Path("slurm"), options["parameters"], 3)
            submitted.extend(tasks)

        def submit(self):
            return ["77"]

    monkeypatch.setattr(evaluation, "JobRequest", Request)
    return submitted


def test_a_training_job_submits_the_evaluation_and_trains_on(config, model, in_a_job):
    evaluate = online_evaluation(config, NOTHING_YET, ALONE)
    evaluate(model, 5, never)
    (task,) = in_a_job
    assert task.weights.is_file()
    assert (task.config.nodes, task.config.ngpus, task.config.evals) == (1, 2, config.evals)
    assert task.folder == os.getcwd()
    assert recorded(config) == []


def test_what_is_evaluated_already_is_not_submitted_again(config, model, in_a_job):
    done = SimpleNamespace(evaluated_tasks=lambda step: {"here"} if step == 5 else set())
    online_evaluation(config, done, ALONE)(model, 5, never)
    assert in_a_job == []
    online_evaluation(config, done, ALONE)(model, 6, never)
    assert len(in_a_job) == 1


def test_the_main_process_alone_submits(config, model, in_a_job):
    online_evaluation(config, NOTHING_YET, Processes(1, 2, torch.device("cpu")))(model, 5, never)
    assert in_a_job == []
    assert not (config.folder / "evaluating").exists()


@pytest.mark.parametrize("error", [UserError("no"), OSError("no"), RuntimeError("no")])
def test_a_submission_that_fails_is_a_warning(config, model, in_a_job, monkeypatch, caplog, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(evaluation.JobRequest, "submit", refuse)
    monkeypatch.setattr(logging.getLogger("llip"), "propagate", True)
    online_evaluation(config, NOTHING_YET, ALONE)(model, 5, never)
    assert "step 5 is not evaluated: no" in caplog.text
    assert list((config.folder / "evaluating").iterdir()) == []


def test_a_wrong_evaluation_file_is_told_at_the_start_in_a_job_too(config, in_a_job):
    with pytest.raises(UserError, match="is not there"):
        online_evaluation(config.replace(evals=("nowhere.yaml",)), None, ALONE)
