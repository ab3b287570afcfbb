"""Evaluation during training: by the run itself, or handed to other jobs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llip.cluster.pending import evaluate_saved, save_for_eval
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from llip.system.processes import Processes
from llip.training.evaluation import online_evaluation
from tests.cluster.evaluated_run import evaluated_run, recorded

ALONE = Processes(0, 1, torch.device("cpu"))


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
    for name in ("RANK", "WORLD_SIZE"):
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
def submitted() -> list[tuple]:
    return []


@pytest.fixture
def evaluate(config, submitted):
    """Return the online evaluation of a run that submits jobs, as process `rank` of two, with some tasks `done`."""

    def make(rank: int = 0, done=lambda step: set()):
        log = SimpleNamespace(evaluated_tasks=done)
        processes = Processes(rank, 2, torch.device("cpu"))
        return online_evaluation(config, log, processes, lambda *arguments: submitted.append(arguments))

    return make


def test_an_evaluation_is_submitted_instead_of_run(config, model, evaluate, submitted):
    evaluate()(model, 5, never)
    assert submitted == [(config, model, 5)]
    assert recorded(config) == []


def test_what_is_evaluated_already_is_not_submitted_again(model, evaluate, submitted):
    done = evaluate(done=lambda step: {"here"} if step == 5 else set())
    done(model, 5, never)
    assert submitted == []
    done(model, 6, never)
    assert len(submitted) == 1


def test_the_main_process_alone_submits(model, evaluate, submitted):
    evaluate(rank=1)(model, 5, never)
    assert submitted == []


@pytest.mark.parametrize("submit", [None, print])
def test_a_wrong_evaluation_file_is_an_error_at_the_start(config, submit):
    with pytest.raises(UserError, match="is not there"):
        online_evaluation(config.replace(evals=("nowhere.yaml",)), None, ALONE, submit)
