"""An evaluation that a run did not get to the end of: made up when it goes on, also when the schedule is at its end."""

import json
import signal

import pytest

from llip.configs import Config
from llip.main import train
from llip.training import evaluation as online
from llip.training.checkpoints.records import read_records
from llip.training.distributed.signals import StopRequest
from tests.helpers import write_pairs

TASKS = ("first", "second")


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs", 32, 16)
    entry = {"type": "retrieval", "path": str(tmp_path / "pairs"), "split": "*.tar", "metric": "recall"}
    (tmp_path / "catalog.json").write_text(json.dumps(dict.fromkeys(TASKS, entry)))
    for task in TASKS:
        text = f"eval_name: mc\ncatalog_name: {tmp_path}/catalog.json\ntasks: [{task}]\nbatch_size: 8\nworkers: 0\n"
        (tmp_path / f"{task}.yaml").write_text(text)
    return Config(
        name="run", logs=str(tmp_path), train_data=pairs, train_num_samples=32, model=tiny_model, mixture_tokens=4,
        pool_heads=4, batch_size=16, epochs=2, lr=1e-3, warmup=2, precision="fp32", workers=0, log_steps=1,
        save_frequency=0, seed=3, report_to=(), eval_steps=2,
        evals=tuple(str(tmp_path / f"{task}.yaml") for task in TASKS),
    )  # fmt: skip


def evaluated(config):
    return [(record["step"], record["task"]) for record in read_records(config.folder / "evals.jsonl")]


def after_first_task(monkeypatch, step, action):
    """Run `action` when the first task of `step` has been evaluated."""
    tell = online.report_result

    def telling(result, at):
        stop = tell(result, at)
        if at == step and result.task == TASKS[0]:
            monkeypatch.setattr(online, "report_result", tell)
            online_log_first(result, at)
            action()
        return stop and not (at == step and result.task == TASKS[0])

    def online_log_first(result, at):
        telling.run_log.evaluation(at, result.task, result.values)

    make = online.online_evaluation

    def making(config, run_log, processes, submit):
        telling.run_log = run_log
        return make(config, run_log, processes, submit)

    monkeypatch.setattr(online, "online_evaluation", making)
    monkeypatch.setattr(online, "report_result", telling)


class Killed(Exception):
    """Ends a run as a kill would."""


def kill():
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_evaluation_is_made_up(config, monkeypatch, step):
    with monkeypatch.context() as patch:
        after_first_task(patch, step, kill)
        with pytest.raises(Killed):
            train(config, "cpu")
    assert evaluated(config)[-1] == (step, "first")
    assert train(config, "cpu")
    assert evaluated(config) == [(at, task) for at in (2, 4) for task in TASKS]
    assert (config.folder / "figures" / "curves.png").is_file()
    assert train(config, "cpu")
    assert evaluated(config) == [(at, task) for at in (2, 4) for task in TASKS], "a finished run evaluates nothing"


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_leaves_the_evaluation_off(config, monkeypatch, step):
    requests = []
    make = StopRequest.__init__

    def noting(self):
        make(self)
        requests.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__init__", noting)
        after_first_task(patch, step, lambda: requests[0].note(signal.SIGUSR2))
        assert not train(config, "cpu"), "asked to stop"
    assert evaluated(config)[-1] == (step, "first")
    assert (config.folder / "checkpoints" / f"step_{step}.pt").is_file(), "saved before the evaluation"
    assert train(config, "cpu")
    assert evaluated(config) == [(at, task) for at in (2, 4) for task in TASKS]


def test_a_checkpoint_beyond_the_schedule_is_a_finished_run(config):
    config = config.replace(eval_steps=0)
    train(config, "cpu")
    shorter = config.replace(name="shorter", epochs=1, resume=str(config.folder / "checkpoints" / "latest.pt"))
    assert train(shorter, "cpu"), "finished, not stopped"
    assert "finished already: nothing to do" in (shorter.folder / "log.txt").read_text()
