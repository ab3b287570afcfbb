"""Mistakes that are reported before anything is submitted."""

import fcntl
import re
from pathlib import Path

import pytest

from llip.cluster.checks import check_evaluations, check_folder, check_slurm, check_training
from llip.configs import Config
from llip.errors import UserError
from tests.helpers import write_tar


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for index in range(2):
        write_tar(tmp_path / f"{index}.tar", [{"txt": b"a word"}])
    return f"{tmp_path}/{{0..1}}.tar"


def config(**fields) -> Config:
    return Config(**{"train_num_samples": 1000, "batch_size": 10, "name": "mine"} | fields)


def test_a_good_config_passes_without_a_word(shards):
    assert check_training(config(train_data=shards)) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_data": ""}, "train_data is empty"),
        ({"train_data": "{folder}/{{0..3}}.tar"}, "2 of 4 shards are missing"),
        ({"train_data": "{folder}/*.tgz"}, "matches no file"),
        ({"train_data": "s3://bucket/0.tar"}, "pipe:aws s3 cp"),
        ({"train_num_samples": 9}, "less than one global batch of 10"),
        ({"model": "models/mine.json"}, "model = 'models/mine.json' is not there"),
        ({"pretrained": "./weights.pt"}, "pretrained = './weights.pt' is not there"),
        ({"resume": "logs/old/latest.pt"}, "resume = 'logs/old/latest.pt' is not there"),
        ({"eval_steps": 10, "evals": ("nowhere.yaml",)}, "'nowhere.yaml' is not there"),
    ],
)
def test_what_the_run_would_stop_at(shards, tmp_path, fields, message):
    fields = {name: text.format(folder=tmp_path) if name == "train_data" else text for name, text in fields.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        check_training(config(**{"train_data": shards} | fields))


def test_what_cannot_be_looked_at_is_said(shards):
    remote = "pipe:cat /nowhere.tar"
    notes = check_training(config(train_data=f"{shards}@0.5::{remote}::scenes:/nowhere", pretrained="openai"))
    assert [note.split()[0] for note in notes] == ["pipe:cat", "scenes:/nowhere", "pretrained"]


def test_evaluations_are_loaded_with_their_catalogs_and_tasks(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tasks: [imagenet_2]\n")
    with pytest.raises(UserError, match="imagenet_2"):
        check_evaluations((str(path),))


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tmp_path):
    check_folder(tmp_path / "run")
    with open(tmp_path / "run" / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by"):
            check_folder(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(tmp_path / "file" / "run")


def test_a_machine_without_slurm_is_told_the_other_ways(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no sbatch .*--dry-run.*llip\.main"):
        check_slurm()
