"""Sweeps: results are reused for the same config only, and a run's processes find a user's own pooling."""

import functools
import glob
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import ablations, captions, quickstart, sweep
from benchmarks.sweep import Result, Variant, run_variants, table
from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError

BASE = Config(model="ViT-B-32", train_num_samples=1000, batch_size=10, lr=0.25)


@pytest.fixture
def trained(monkeypatch) -> list[Config]:
    """Stand in for training and evaluation; note what is trained."""
    configs: list[Config] = []

    def train(config: Config) -> None:
        configs.append(config)
        (config.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "evaluate", lambda config: {"task top1": config.lr})
    return configs


def run(logs: Path, **changes) -> list[Result]:
    return run_variants([Variant("+ mine", BASE.replace(**changes))], [0, 1], logs, "p")


def test_a_result_is_used_again(trained, tmp_path):
    first = run(tmp_path)
    assert [config.name for config in trained] == ["p_mine_seed0", "p_mine_seed1"]
    assert [result.values for result in first] == [{"task top1": 0.25}] * 2
    assert run(tmp_path, workers=7, name="other") == first  # operational: the same experiment
    assert run(tmp_path, batch_size=5, accum_freq=2) == first  # the same global batch
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr: 0\.25 there, 0\.5 now"),
        ({"batch_size": 20}, "global batch: 10 there, 20 now"),
        ({"evals": ("mine.yaml",)}, r"evals: \[\] there, \['mine.yaml'\] now"),
    ],
)
def test_a_result_of_another_config_is_refused_before_anything_trains(trained, tmp_path, changes, message):
    run_variants([Variant("+ mine", BASE)], [1], tmp_path, "p")
    with pytest.raises(UserError, match=message + r".*another folder with --logs"):
        run(tmp_path, **changes)
    assert len(trained) == 1


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"variant": "a", "seed": 0, "values": {}, "train_seconds": 1})])
def test_a_result_without_its_config_is_refused(trained, tmp_path, text):
    (tmp_path / "p_mine_seed0").mkdir()
    (tmp_path / "p_mine_seed0" / sweep.RESULT).write_text(text)
    with pytest.raises(UserError, match="does not name the config"):
        run(tmp_path)
    assert trained == []


def test_the_time_of_a_resumed_run_is_not_known(trained, tmp_path):
    (tmp_path / "p_mine_seed0" / "checkpoints").mkdir(parents=True)
    resumed, straight = run(tmp_path)
    assert resumed.train_seconds is None
    assert straight.train_seconds >= 0
    results = [Result("a", 0, {"k": 0.5}, None), Result("a", 1, {"k": 0.7}, 30.0), Result("b", 0, {"k": 1.0}, None)]
    assert table(results, {"head": "k"}).splitlines()[2:] == [
        "| a | 60.0 (50.0-70.0) | 30 |",
        "| b | 100.0 (100.0-100.0) | - |",
    ]


def test_other_processes_find_a_users_own_pooling(tmp_path, monkeypatch):
    config = search_config("examples/extensions.py:custom", [f"logs={tmp_path}", "name=own", "ngpus=2"])
    seen = []
    monkeypatch.setattr("llip.main.launch", lambda config, words: seen.append((config, words)) or 0)
    sweep.train(config)
    ((launched, (word,)),) = seen
    assert launched == config
    code = (
        f"from llip.config_search import search_config as s; c = s({word!r}); print(c.pooling, c.loss, c.ngpus, c.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == f"{config.pooling} {config.loss} 2 own\n", done.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "labels"),
    [
        (quickstart, ["lr=0.125", "--rungs", "average", "Llip"], ["average", "Llip"]),
        (ablations, ["tokens", "lr=0.125", "--values", "1", "4"], ["K = 1", "K = 4"]),
        (ablations, ["temperature", "lr=0.125", "--values", "0.5"], ["tau = 0.5"]),
        (ablations, ["ladder", "lr=0.125"], ["SigLIP", "+ registers", "average", "learned weights", "Llip"]),
    ],
)
def test_programs_write_table_figure_and_json(trained, tmp_path, monkeypatch, capsys, program, arguments, labels):
    values = dict.fromkeys(quickstart.COLUMNS.values(), 0.5)
    monkeypatch.setattr(sweep, "evaluate", lambda config: values)
    command = [*arguments, "--seeds", "3", "4", "--logs", str(tmp_path), "--json"]
    assert program.main(command) == 0
    assert [config.lr for config in trained] == [0.125] * 2 * len(labels)
    record = json.loads(capsys.readouterr().out)
    assert [(row["variant"], row["seed"]) for row in record["results"]] == [(x, s) for s in (3, 4) for x in labels]
    (image,) = tmp_path.glob("*.png")
    assert json.loads(image.with_suffix(".json").read_text()) == record
    rows = image.with_suffix(".md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == labels
    assert program.main(command[:-1]) == 0
    assert "figure: " in capsys.readouterr().out
    assert len(trained) == 2 * len(labels), "results are used again"


def test_runs_of_equal_time_have_steps_by_their_speed(monkeypatch, tmp_path):
    speeds = {1: 100.0, 4: 30.0}
    monkeypatch.setattr(captions, "images_per_second", lambda config, logs: speeds[config.captions_per_image])
    one, four = captions.step_variants({"Llip": BASE}, [1, 4], "time", tmp_path)
    assert (one.label, one.config) == ("Llip, N = 1", BASE)
    assert four.config == BASE.replace(captions_per_image=4, train_num_samples=300)
    _, four = captions.step_variants({"Llip": BASE}, [1, 4], "images", tmp_path)
    assert four.config == BASE.replace(captions_per_image=4)


def test_scenes_with_fewer_captions_are_what_their_runs_train_on(monkeypatch, tmp_path):
    small = functools.partial(captions.ensure_scenes, train=3, test=1)
    monkeypatch.setattr(captions, "ensure_scenes", small)
    for variant, count in zip(captions.data_variants({"Llip": BASE}, [1, 3], tmp_path), [1, 3], strict=True):
        assert variant.label == f"Llip, captions = {count}"
        (shard,) = glob.glob(variant.config.train_data)
        with tarfile.open(shard) as tar:
            record = json.load(tar.extractfile("000000.json"))
        assert len(record["captions"]) == count
