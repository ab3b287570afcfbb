"""The task of an evaluation job, as the training job hands it over: another process, which knows nothing yet."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from llip.cluster import evaluation
from llip.cluster.evaluation import EvaluationJobs, EvaluationTask
from llip.config_search import search_config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from tests.cluster.evaluated_run import evaluated_run, recorded

ROOT = Path(__file__).parents[2]
JOBS = EvaluationJobs(Path("slurm"), {"nodes": 1, "ntasks_per_node": 2}, 3)
MINE = """
from llip.configs import Config


class Mine:
    @classmethod
    def build(cls, mixture_tokens, width, heads, temperature):
        return cls()


def mine() -> Config:
    return Config(pooling=f"{__file__}:Mine", name="run")
"""
JOB = """
import pickle, sys
from llip.cluster import evaluation, pending
from llip.extensions import find_extension
evaluation.join_job = lambda: None
pending.evaluate_saved = lambda config, weights: print(find_extension("pooling", config.pooling).__name__, weights)
task = pickle.load(open(sys.argv[1], "rb"))
task()
task.__submitit_checkpoint__().function()  # what submitit runs after a requeue
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A submitted task of a config with a pooling from a user's file."""
    (tmp_path / "mine.py").write_text(MINE)
    config = search_config(f"{tmp_path / 'mine.py'}:mine")
    taken = []

    class Request:
        def __init__(self, logs, parameters, tasks, max_timeouts):
            taken.extend(tasks)

        def submit(self):
            return ["77"]

    monkeypatch.setattr(evaluation, "JobRequest", Request)
    assert JOBS.submit(config, tmp_path / "step_5.pt") == "77"
    return taken[0]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_job_finds_a_pooling_from_a_file(task, tmp_path):
    (tmp_path / "task.pkl").write_bytes(pickle.dumps(task))
    command = [sys.executable, "-c", JOB, str(tmp_path / "task.pkl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.splitlines() == [f"Mine {tmp_path / 'step_5.pt'}"] * 2, done.stderr


@pytest.fixture
def run(tmp_path):
    """A run's config and its model."""
    config = evaluated_run(tmp_path)
    return config, create_model(model_spec(config)).eval()


def test_a_model_is_saved_and_its_evaluation_submitted(run, monkeypatch):
    submitted: list[EvaluationTask] = []

    class Request:
        def __init__(self, logs, parameters, tasks, max_timeouts):
            assert (logs, parameters, max_timeouts) == (JOBS.logs, JOBS.parameters, 3)
            submitted.extend(tasks)

        def submit(self):
            return ["77"]

    monkeypatch.setattr(evaluation, "JobRequest", Request)
    config, model = run
    JOBS(config, model, 5)
    (task,) = submitted
    assert task.weights.is_file()
    assert (task.config.nodes, task.config.ngpus, task.config.evals) == (1, 2, config.evals)
    assert task.folder == os.getcwd()
    assert recorded(config) == []


@pytest.mark.parametrize("error", [UserError("no"), OSError("no")])
def test_a_submission_that_fails_is_a_warning(run, monkeypatch, caplog, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(evaluation.JobRequest, "submit", refuse)
    monkeypatch.setattr(logging.getLogger("llip"), "propagate", True)
    config, model = run
    JOBS(config, model, 5)
    assert "step 5 is not evaluated: no" in caplog.text
    assert list((config.folder / "evaluating").iterdir()) == []
