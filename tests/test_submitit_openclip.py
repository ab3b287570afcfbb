"""The command that submits training: its script, its array of seeds, and mistakes reported before the submission."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llip.cluster.evaluation import EvaluationJobs
from llip.cluster.training import parse_training, training_request
from llip.config_search import search_config
from submitit_openclip import main
from tests.helpers import write_tar

ROOT = Path(__file__).parent.parent


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_tar(tmp_path / "0.tar", [{"txt": b"a word"}])
    return ["llip_quickstart", "device=cpu", "ngpus=2", f"train_data={tmp_path}/0.tar", f"logs={tmp_path}/logs"]


def test_a_published_config_asks_for_its_nodes_and_gpus(tmp_path):
    command = parse_training(["llip_b16_k32", "workers=4", f"logs={tmp_path}", "--partition", "gpu", "--time", "60"])
    parameters = training_request(command, write=False).parameters
    expected = {"nodes": 16, "ntasks_per_node": 8, "gpus_per_node": "8", "cpus_per_task": 6, "time": 60,
                "job_name": "llip_b16_k32", "partition": "gpu"}  # fmt: skip
    assert {name: parameters[name] for name in expected} == expected


def test_a_dry_run_prints_the_script_without_slurm_and_writes_nothing(words, tmp_path, capsys, monkeypatch):
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **more: None if name in ("srun", "sbatch") else real(name, **more)
    )
    assert main([*words, "--dry-run", "--mem", "4G"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    for line in ("#SBATCH --ntasks-per-node=2", "#SBATCH --mem=4G", "#SBATCH --cpus-per-task=3"):
        assert line in script.splitlines()
    assert "gpus" not in script
    assert not (tmp_path / "logs").exists()


def test_a_dry_run_says_what_a_submission_would_be_refused_for(words, capsys):
    assert main([*words[:3], "train_data=/nowhere/0.tar", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "#SBATCH" in printed.out
    assert "the submission would fail: train_data: 1 of 1 shards are missing" in printed.err


def test_the_task_runs_the_config_as_it_was_resolved(words, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from llip.configs import Config\n\n\ndef small():\n    return Config(batch_size=7)\n")
    request = training_request(parse_training([f"{mine}:small", *words[1:], "lr=0.125"]))
    mine.write_text("edited after the submission")
    (task,) = request.tasks
    config = search_config(task.arguments[0], task.arguments[1:])
    assert (config.name, config.batch_size, config.lr, config.ngpus) == ("small", 7, 0.125, 2)
    assert config.folder == tmp_path / "logs" / "small"
    assert task.folder == str(Path.cwd())
    assert Path(task.arguments[0]).is_relative_to(tmp_path / "logs" / "small" / "code")
    assert request.logs == tmp_path / "logs" / "small" / "slurm"


def test_an_array_gives_each_run_its_seed_and_its_folder(words):
    request = training_request(parse_training([*words, "seed=5", "name=ladder", "--array-seeds", "3"]))
    configs = [search_config(task.arguments[0], task.arguments[1:]) for task in request.tasks]
    assert [config.seed for config in configs] == [5, 6, 7]
    assert [config.folder.name for config in configs] == ["ladder-seed5", "ladder-seed6", "ladder-seed7"]
    assert request.logs.parent.name == "ladder"


def test_evaluation_jobs_are_small_and_can_be_switched_off(words):
    def jobs(*more: str) -> EvaluationJobs | None:
        return training_request(parse_training([*words, *more]), write=False).tasks[0].evaluation_jobs

    parameters = jobs("--partition", "p", "--eval-tasks", "2", "--eval-time", "30").parameters
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["time"]) == (1, 2, 30)
    assert (parameters["partition"], parameters["job_name"]) == ("p", "llip_quickstart-eval")
    assert jobs("--eval-tasks", "0") is None
    assert jobs("eval_steps=0") is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["llip_quickstrat"], "llip_quickstart"),
        (["llip_quickstart", "batchsize=3"], "batch_size"),
        (["llip_quickstart", "device=cpu", "--gpus-per-node", "1"], "runs on CPUs"),
        (["llip_quickstart", "--time", "1", "--signal-margin", "90"], "--signal-margin 90"),
        (["llip_quickstart", "--eval-tasks", "-1"], "--eval-tasks -1"),
        (["llip_quickstart"], "no sbatch"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(more, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_command_answers_as_a_program(words):
    command = [sys.executable, str(ROOT / "submitit_openclip.py"), *words, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "-m submitit.core._submit" in done.stdout
