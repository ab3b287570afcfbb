"""The results file: what is kept, evaluated again and set aside, and who may write it."""

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from evals import mc, results
from llip.clipeval.eval_config import EvalConfig
from llip.errors import UserError
from tests.clipeval.fakes import FakeModel, write_catalog, write_wds
from tests.evals.helpers import CLASSES, load_fake, results_of

pytestmark = pytest.mark.usefixtures("forked")


def load_replaced(config: EvalConfig) -> FakeModel:
    """As of a run that trains on: `latest.pt` is replaced in the meantime."""
    Path(config.checkpoint_path).write_text("12")
    return load_fake(config)


def load_nothing(config: EvalConfig) -> FakeModel:
    raise UserError("no model in here")


def test_a_rerun_keeps_what_is_done(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    catalog = Path(config.catalog_name)
    entries = json.loads(catalog.read_text())
    write_catalog(catalog, entries | {"gone": {"type": "webdataset", "path": "gone"}})
    assert mc.run(config, ["cpu"], load_fake) == 1  # one task could not be evaluated, the others were
    first = results_of(config)
    assert "dataset folder gone is not in" in first["tasks"]["gone"]["error"]
    assert "gone: dataset folder" in capsys.readouterr().err
    write_wds(catalog.parent / "gone", [0, 1, 2], CLASSES)
    assert mc.run(config, ["cpu"], load_fake) == 0
    second = results_of(config)
    assert "2 of 3 tasks are done already" in capsys.readouterr().out
    assert second["tasks"]["gone"]["n"] == 3
    for task in ("wds", "pairs"):
        assert second["tasks"][task] == first["tasks"][task]  # the seconds too: not evaluated again
    write_catalog(catalog, entries | {"wds": {"type": "webdataset", "path": "wds", "metric": "mean_per_class"}})
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert results_of(config)["tasks"]["wds"]["metric"] == "mean_per_class"  # another entry: evaluated again


def test_another_checkpoint_starts_over_and_loses_nothing(config: EvalConfig) -> None:
    mc.run(config, ["cpu"], load_fake)
    first = results_of(config)
    Path(config.checkpoint_path).write_text("12")
    with pytest.raises(UserError, match="no model in here"):
        mc.run(config, ["cpu"], load_nothing)
    assert results_of(config) == first
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert results_of(config)["tasks"]["pairs"] != first["tasks"]["pairs"]
    assert json.loads(Path(config.output_dir, "results.previous.json").read_text()) == first


def test_a_checkpoint_that_changes_while_it_is_loaded_gives_no_results(config: EvalConfig) -> None:
    with pytest.raises(UserError, match=r"model\.pt changed while it was loaded; evaluate a step_<N>\.pt"):
        mc.run(config, ["cpu"], load_replaced)
    assert not Path(config.output_dir, "results.json").exists()
    assert mc.run(config, ["cpu"], load_fake) == 0


@pytest.mark.parametrize("name", ["results.json", "results.md", "per_sample"])
def test_results_that_cannot_be_written(config: EvalConfig, name: str) -> None:
    path = Path(config.output_dir, name)
    path.mkdir(parents=True) if name != "per_sample" else (path.parent.mkdir(), path.write_text(""))
    with pytest.raises(UserError, match=f"results cannot be written: .*{name}.*; set another output_dir, or make room"):
        mc.run(config, ["cpu"], load_fake)


@pytest.mark.slow  # starts two processes
def test_results_that_cannot_be_written_end_every_process(config: EvalConfig) -> None:
    Path(config.output_dir, "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match="results cannot be written"):
        mc.run(config, ["cpu", "cpu"], load_fake)


def _replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def _add_image(folder: Path) -> None:
    write_wds(folder / "wds", [i % 3 for i in range(31)], CLASSES)


def _copy_time(path: Path, text: str) -> None:
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "the dataset's class names": (
        lambda folder: _replace_text(folder / "wds/classnames.txt", "bee", "cat"),
        "data files",
    ),
    "the dataset's prompts": (
        lambda folder: _copy_time(folder / "wds/zeroshot_classification_templates.txt", "a photo of {c}\nmy {c}  \n"),
        "data files",
    ),
    "images": (_add_image, "data files"),
    "a file of prompts": (lambda folder: _copy_time(folder / "prompts.txt", "the {c}\n"), "prompts"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_is_evaluated_again_when_what_it_reads_changed(
    config: EvalConfig, change: str, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(config.catalog_name).parent
    entry = {"type": "webdataset", "path": "wds"}
    if change == "a file of prompts":
        entry |= {"prompts": "prompts.txt"}
        (folder / "prompts.txt").write_text("one {c}\n")
    write_catalog(Path(config.catalog_name), {"wds": entry, "pairs": {"type": "retrieval", "path": "pairs"}})
    assert mc.run(config, ["cpu"], load_fake) == 0
    first = results_of(config)["tasks"]
    capsys.readouterr()
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert "2 of 2 tasks are done already" in capsys.readouterr().out
    act, words = CHANGES[change]
    act(folder)
    assert mc.run(config, ["cpu"], load_fake) == 0
    out = capsys.readouterr().out
    assert f"wds is evaluated again: {words} changed" in out
    assert "1 of 2 tasks are done already" in out
    assert results_of(config)["tasks"]["wds"] != first["wds"]
    assert results_of(config)["tasks"]["pairs"] == first["pairs"]


def test_weights_are_known_by_their_content(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    assert mc.run(config, ["cpu"], load_fake) == 0
    checkpoint, first = Path(config.checkpoint_path), results_of(config)
    checkpoint.touch()
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert "2 of 2 tasks are done already" in capsys.readouterr().out
    _copy_time(checkpoint, "7")  # other weights of the same size and time
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert results_of(config)["tasks"]["pairs"] != first["tasks"]["pairs"]
    second = results_of(config)
    _copy_time(checkpoint, "8")
    assert mc.run(config, ["cpu"], load_fake) == 0  # a third model overwrites no earlier results
    previous = [json.loads(path.read_text()) for path in sorted(Path(config.output_dir).glob("results.previous*"))]
    assert sorted(previous, key=str) == sorted([first, second], key=str)


def test_results_of_earlier_versions_are_set_aside(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    assert mc.run(config, ["cpu"], load_fake) == 0
    stored = results_of(config)
    stored["model"]["checkpoint"] |= {"modified_ns": 1}
    del stored["model"]["checkpoint"]["sha256"]
    for task in stored["tasks"].values():
        del task["inputs"]
    Path(config.output_dir, "results.json").write_text(json.dumps(stored))
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert "earlier results are of another model or protocol" in capsys.readouterr().out
    assert json.loads(Path(config.output_dir, "results.previous.json").read_text()) == stored


def test_one_evaluation_at_a_time_writes_into_a_folder(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "LOCK_PATIENCE", 0.1)
    with results.locked_output(Path(config.output_dir)):
        with pytest.raises(UserError, match=rf"output_dir .*out is in use by process {os.getpid()} on .*; wait for it"):
            mc.run(config, ["cpu"], load_fake)
        assert not Path(config.output_dir, "results.json").exists()
        assert mc.run(replace(config, output_dir=config.output_dir + "2"), ["cpu"], load_fake) == 0
    assert mc.run(config, ["cpu"], load_fake) == 0  # released


def _hold(folder: Path, ready: Path) -> None:
    with results.locked_output(folder):
        ready.touch()
        time.sleep(60)


@pytest.mark.slow
def test_the_lock_of_a_killed_evaluation_is_released(config: EvalConfig, tmp_path: Path) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(Path(config.output_dir), tmp_path / "on"))
    holder.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "on").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
        mc.run(config, ["cpu"], load_fake)
    holder.kill()
    holder.join()
    assert mc.run(config, ["cpu"], load_fake) == 0
