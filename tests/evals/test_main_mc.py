"""The program `mc` with a small fake model: tables, charts, outcomes, mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals import compare, main_mc, mc
from llip.clipeval.eval_config import EvalConfig
from llip.errors import EXIT_USER, UserError
from tests.clipeval.fakes import write_catalog, write_imagefolder
from tests.evals.helpers import CLASSES, load_fake, results_of


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


def test_a_mistake_on_the_command_line_has_no_traceback(config: EvalConfig, capsys: pytest.CaptureFixture) -> None:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text("mc_config_name: llip_quickstart\ncheckpoint_path: gone.pt\noutput_dir: out\n")
    assert main_mc.main(["--fname", str(path), "--devices", "cpu"]) == EXIT_USER
    assert capsys.readouterr().err.startswith("error: checkpoint ")


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
