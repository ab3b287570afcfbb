"""The program `mc` with a small fake model: results on disk, what a rerun does, exit codes, processes that fail."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evals import compare, main_mc, mc, results
from evals.devices import ProcessKilledError, choose_devices, launch
from llip.clipeval.eval_config import EvalConfig
from llip.errors import EXIT_USER, RunError, UserError
from tests.clipeval.fakes import FakeModel, write_catalog, write_imagefolder, write_retrieval, write_wds

CLASSES = ["ant", "bee", "cow"]


def load_fake(config: EvalConfig) -> FakeModel:
    return FakeModel(seed=int(Path(config.checkpoint_path).read_text()))


class Deadly(FakeModel):
    """Is killed, as by the system when memory runs out, where it meets the class name KILL."""

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        if any("KILL" in bytes(row).decode() for row in tokens.tolist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_text(tokens)


def load_deadly(config: EvalConfig) -> FakeModel:
    return Deadly(seed=int(Path(config.checkpoint_path).read_text()))


def load_killed(config: EvalConfig) -> FakeModel:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return load_fake(config)


def load_replaced(config: EvalConfig) -> FakeModel:
    """As of a run that trains on: `latest.pt` is replaced in the meantime."""
    Path(config.checkpoint_path).write_text("12")
    return load_fake(config)


def load_nothing(config: EvalConfig) -> FakeModel:
    raise UserError("no model in here")


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    """Two good tasks, a checkpoint, and an output folder."""
    write_wds(tmp_path / "wds", [i % 3 for i in range(30)], CLASSES)
    write_retrieval(tmp_path / "pairs", 6)
    entries = {"wds": {"type": "webdataset", "path": "wds"}, "pairs": {"type": "retrieval", "path": "pairs"}}
    write_catalog(tmp_path / "catalog.json", entries)
    (tmp_path / "model.pt").write_text("0")
    return EvalConfig(
        mc_config_name="llip_quickstart",
        checkpoint_path=str(tmp_path / "model.pt"),
        output_dir=str(tmp_path / "out"),
        catalog_name=str(tmp_path / "catalog.json"),
        workers=0,
    )


def results_of(config: EvalConfig) -> dict:
    return json.loads(Path(config.output_dir, "results.json").read_text())


def test_results(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    assert mc.run(config, ["cpu"], load_fake) == 0
    results = results_of(config)
    wds, pairs = results["tasks"]["wds"], results["tasks"]["pairs"]
    assert (wds["metric"], wds["n"], wds["skipped"]) == ("top1", 30, 0)
    assert wds["seconds"] > 0
    assert 0 <= wds["value"] <= 1
    assert results["mean"] == wds["value"]
    assert {key for key in pairs if "R@" in key} == {
        f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert results["model"]["checkpoint"]["path"] == config.checkpoint_path
    percent = f"{100 * wds['value']:.1f}"
    assert percent in capsys.readouterr().out
    text = Path(config.output_dir, "results.md").read_text()
    assert f"| wds | top1 | {percent} | 30 | 0 |" in text
    recalls = [f"{100 * pairs[f'{way}_R@{k}']:.1f}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert f"| pairs | all | {' | '.join(recalls)} | 6 | 12 | 0 |" in text
    assert f"| mean | of 1 classification tasks | {percent} |" in text


def test_several_metrics_in_one_entry(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    """A row for each in the tables; `value` and the mean are the first; compare holds each against its like."""
    entry = {"type": "webdataset", "path": "wds"}
    write_catalog(Path(config.catalog_name), {"wds": entry | {"metrics": ["mean_per_class", "top1"]}})
    assert mc.run(config, ["cpu"], load_fake) == 0
    results = results_of(config)
    wds = results["tasks"]["wds"]
    assert (wds["metric"], list(wds["values"])) == ("mean_per_class", ["mean_per_class", "top1"])
    assert results["mean"] == wds["value"] == wds["values"]["mean_per_class"]
    text = Path(config.output_dir, "results.md").read_text()
    assert f"| wds | mean_per_class | {100 * wds['value']:.1f} | 30 | 0 |" in text
    assert f"| wds | top1 | {100 * wds['values']['top1']:.1f} |  |  |  |  |" in text
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert "1 of 1 tasks are done already" in capsys.readouterr().out
    assert results_of(config) == results
    other = replace(config, output_dir=config.output_dir + "2")
    write_catalog(Path(config.catalog_name), {"wds": entry | {"metric": "mean_per_class"}})
    assert mc.run(other, ["cpu"], load_fake) == 0
    capsys.readouterr()
    assert compare.main([config.output_dir, config.output_dir, "--json"]) == 0
    assert [row["metric"] for row in json.loads(capsys.readouterr().out)["rows"][:2]] == ["mean_per_class", "top1"]
    assert compare.main([config.output_dir, other.output_dir, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["task"], row["metric"]) for row in rows if row["task"] == "wds"] == [("wds", "mean_per_class")]


def test_unreadable_images_are_named_and_failed_tasks_do_not_enter_the_mean_silently(
    config: EvalConfig, capsys: pytest.CaptureFixture
) -> None:
    write_imagefolder(Path(config.catalog_name).parent / "folder", CLASSES, 2)
    (Path(config.catalog_name).parent / "folder/bee/001.png").write_bytes(b"")
    folder = {"type": "imagefolder", "path": "folder", "prompts": ["a {c}"]}
    entries = {"folder": folder, "gone": folder | {"path": "gone"}}
    write_catalog(Path(config.catalog_name), entries)
    assert mc.run(config, ["cpu"], load_fake) == 1
    printed = capsys.readouterr()
    words = "folder: 1 of 6 images cannot be read and are skipped, for instance "
    text = Path(config.output_dir, "results.md").read_text()
    for place in (printed.err, text):
        assert words in place
        assert "bee/001.png" in place
    assert "of 1 classification tasks, 1 failed" in printed.out
    assert "\n- gone failed: dataset folder gone" in text


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


def test_a_process_killed_at_its_exit_costs_no_result(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_at_exit(worker, devices, *arguments) -> None:
        launch(worker, devices, *arguments)
        raise ProcessKilledError("process 0 (cpu) was killed by SIGKILL")

    monkeypatch.setattr(mc, "launch", killed_at_exit)
    assert mc.run(config, ["cpu"], load_fake) == 0


@pytest.mark.slow  # starts two processes
def test_results_that_cannot_be_written_end_every_process(config: EvalConfig) -> None:
    Path(config.output_dir, "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match="results cannot be written"):
        mc.run(config, ["cpu", "cpu"], load_fake)


def test_a_chart_that_cannot_be_written_costs_no_result(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    Path(config.output_dir, "results.png").mkdir(parents=True)
    assert mc.run(config, ["cpu"], load_fake) == 0
    assert "warning: the chart cannot be written: " in capsys.readouterr().err


def test_mistakes(config: EvalConfig) -> None:
    with pytest.raises(UserError, match=r"gone\.pt is not there; train it with `llip train llip_quickstart`"):
        mc.run(replace(config, checkpoint_path="gone.pt"), ["cpu"], load_fake)
    with pytest.raises(UserError, match="variable LLIP_TEST_UNSET is not set"):
        mc.run(replace(config, checkpoint_path="$LLIP_TEST_UNSET/a.pt"), ["cpu"], load_fake)
    with pytest.raises(UserError, match=r"'llip_quikstart'.*'llip_quickstart'"):
        mc.run(replace(config, mc_config_name="llip_quikstart"), ["cpu"], load_fake)
    with pytest.raises(UserError, match=r"'pair'.*'pairs'"):
        mc.run(replace(config, tasks=("pair",)), ["cpu"], load_fake)
    with pytest.raises(UserError, match=r"output_dir .*model\.pt cannot be made"):
        mc.run(replace(config, output_dir=config.checkpoint_path), ["cpu"], load_fake)
    Path(config.output_dir).mkdir(exist_ok=True)
    Path(config.output_dir, "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not a results file"):
        mc.run(config, ["cpu"], load_fake)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices(None) == ["cuda:0", "cuda:1"]
    assert choose_devices(["cuda:1"]) == ["cuda:1"]
    assert choose_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    for names, words in [
        (["cuda:2"], "--devices cuda:2: this machine has cpu, cuda:0, cuda:1; for instance --devices cuda:0 cuda:1"),
        (["cuda:0,cuda:1"], "separate devices by spaces: --devices cuda:0 cuda:1"),
        (["0"], "Did you mean 'cuda:0'"),
        (["CPU"], "Did you mean 'cpu'"),
        (["cuda:0", "cuda:0"], "more than once"),
        (["cuda:0", "cpu"], "not both"),
        (["gpu"], "--devices gpu"),
    ]:
        with pytest.raises(UserError, match=words):
            choose_devices(names)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_devices(None) == ["cpu"]
    with pytest.raises(UserError, match="--devices cuda:0: this machine has no CUDA device; write --devices cpu"):
        choose_devices(["cuda:0"])


def test_a_mistake_on_the_command_line_has_no_traceback(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text("mc_config_name: llip_quickstart\ncheckpoint_path: gone.pt\noutput_dir: out\n")
    assert main_mc.main(["--fname", str(path), "--devices", "cpu"]) == EXIT_USER
    assert capsys.readouterr().err.startswith("error: checkpoint ")


def _one_fails_the_other_waits(device: str, pids: Path) -> None:
    (pids / str(os.getpid())).touch()
    if dist.get_rank() == 1:
        raise UserError("the second process has no data")
    dist.barrier()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the second process has no data"):
        launch(_one_fails_the_other_waits, ["cpu", "cpu"], tmp_path)
    for pid in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)


def test_a_task_that_gets_a_process_killed_fails_and_the_others_run(
    config: EvalConfig, capfd: pytest.CaptureFixture
) -> None:
    folder = Path(config.catalog_name).parent
    entries = json.loads(Path(config.catalog_name).read_text())
    write_wds(folder / "deadly", [0, 1, 2], ["ant", "KILL", "cow"])
    deadly = {"type": "webdataset", "path": "deadly"}
    write_catalog(Path(config.catalog_name), {"wds": entries["wds"], "deadly": deadly, "pairs": entries["pairs"]})
    assert mc.run(config, ["cpu", "cpu"], load_deadly) == 1
    tasks = results_of(config)["tasks"]
    assert [name for name in tasks if tasks[name].get("error")] == ["deadly"]
    assert tasks["wds"]["n"] == 30
    assert tasks["pairs"]["n"] == 6
    printed = capfd.readouterr().err
    assert "error: deadly: process 1 (cpu) was killed by SIGKILL (often: out of memory)" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_process_killed_before_any_task_ends_the_evaluation(config: EvalConfig) -> None:
    with pytest.raises(RunError, match=r"process 1 \(cpu\) was killed by SIGKILL .* before the first task"):
        mc.run(config, ["cpu", "cpu"], load_killed)
    assert not Path(config.output_dir, "results.json").exists()


def _fails(device: str) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.slow
def test_a_bug_in_a_process_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"in _fails\n(.*\n)*ZeroDivisionError: a bug"):
        launch(_fails, ["cpu", "cpu"])


def test_outcomes_chart_and_shortlist(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    folder = Path(config.output_dir)
    assert mc.run(config, ["cpu"], load_fake) == 0
    first = results_of(config)["tasks"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "per_sample/wds.npz", allow_pickle=False) as stored:
        assert stored["samples"] == first["wds"]["samples"]
        assert (stored["ranks"] == 0).mean() == pytest.approx(first["wds"]["value"])
        assert stored["labels"].tolist() == [i % 3 for i in range(30)]
    with np.load(folder / "per_sample/pairs.npz", allow_pickle=False) as stored:
        assert stored["owners"].tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5]
        assert (stored["text_ranks"] < 1).mean() == pytest.approx(first["pairs"]["text_to_image_R@1"])
    assert list((folder / "cache").glob("text_*.npz"))
    capsys.readouterr()
    shorter = replace(config, shortlist=10, compare_with=(str(folder),), references={"a paper": 69.6})
    assert mc.run(shorter, ["cpu"], load_fake) == 0
    assert "1 of 2 tasks are done already" in capsys.readouterr().out  # a shortlist concerns retrieval alone
    assert results_of(config)["tasks"]["wds"] == first["wds"]
    assert results_of(config)["tasks"]["pairs"]["shortlist"] == 10
    assert "| pairs | shortlist 10 |" in (folder / "results.md").read_text()
    with pytest.raises(UserError, match="results gone are not there"):
        mc.run(replace(config, compare_with=("gone",)), ["cpu"], load_fake)


def test_the_chart_shows_what_it_was_given(config: EvalConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    mc.run(replace(config, output_dir=str(earlier)), ["cpu"], load_fake)
    wds = json.loads((earlier / "results.json").read_text())["tasks"]["wds"]
    shown = []
    monkeypatch.setattr(mc, "bar_chart", lambda *arguments: shown.extend(arguments))
    Path(config.checkpoint_path).write_text("3")
    Path(config.catalog_name).write_text(Path(config.catalog_name).read_text().replace("pairs", "couples", 1))
    assert mc.run(replace(config, compare_with=(str(earlier),), references={"a": 1.5}), ["cpu"], load_fake) == 0
    _, _, tasks, sides, lines, rules = shown
    assert tasks == ["wds", "mean of these 1", "couples (image_to_text_R@1)", "couples (text_to_image_R@1)"]
    now = 100 * results_of(config)["tasks"]["wds"]["value"]
    couples = results_of(config)["tasks"]["couples"]
    recalls = [100 * couples[f"{way}_R@1"] for way in ("image_to_text", "text_to_image")]
    assert sides == {"this evaluation": [now, now, *recalls], str(earlier): [*[100 * wds["value"]] * 2, None, None]}
    assert lines == {"a": 1.5}
    assert rules == [1, 2]


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
