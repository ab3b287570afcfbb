"""`evals.compare`: intervals against plain resampling and hand-worked cases, and what it says of poor material."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals import compare as program
from evals.bootstrap import RESAMPLES, difference_draws, interval
from evals.compare import compare
from evals.results import CheckpointIdentity, ModelIdentity, ResultsFile, read_results
from llip.clipeval.outcomes import Outcomes, Parts, parts_of
from llip.clipeval.task_result import TaskResult
from llip.errors import EXIT_USER

IMAGES = 200
RNG = np.random.default_rng(5)
BEFORE = (RNG.random(IMAGES) < 0.5).astype(np.uint8)  # places: 0 is right
AFTER = np.where(RNG.random(IMAGES) < 0.2, 0, BEFORE).astype(np.uint8)  # never worse
LABELS = (np.arange(IMAGES) % 10 // 9).astype(np.int32)  # 20 images of class 1


def result(task: str, ranks: np.ndarray, metric: str = "top1", samples: str = "abc", **fields: object) -> TaskResult:
    outcomes = Outcomes(samples, ranks, LABELS[: len(ranks)])
    value = parts_of(outcomes, metric).value() if parts_of(outcomes, metric) else 0.5
    common = {"n": len(ranks), "samples": samples, "outcomes": outcomes}
    return TaskResult(task, metric, {metric: value}, **(common | fields))


def write(folder: Path, *results: TaskResult, precision: str = "fp32") -> str:
    folder.mkdir(exist_ok=True)
    file = ResultsFile(folder, ModelIdentity("config", CheckpointIdentity("a.pt", 1, "0"), "feature", precision))
    for one in results:
        file.add(one)
    return str(folder)


def parts(hits: np.ndarray, groups: np.ndarray | None = None) -> Parts:
    groups = np.zeros(len(hits), np.int64) if groups is None else groups
    return Parts(hits.astype(float), np.ones(len(hits)), groups)


def test_paired_interval_is_that_of_plain_resampling() -> None:
    first, second = BEFORE == 0, AFTER == 0
    rng = np.random.default_rng(1)
    chosen = [rng.integers(0, IMAGES, IMAGES) for _ in range(RESAMPLES)]
    for groups in (np.zeros(IMAGES, np.int64), LABELS.astype(np.int64)):
        plain = []
        for index in chosen:  # the mean within each class that was drawn, then over classes
            present = [index[groups[index] == group] for group in np.unique(groups[index])]
            plain.append(np.mean([second[some].mean() - first[some].mean() for some in present]))
        ours = difference_draws(parts(first, groups), parts(second, groups), paired=True, seed=0, name="t")
        assert ours.mean() == pytest.approx(np.mean(plain), abs=0.003)
        assert ours.std() == pytest.approx(np.std(plain), rel=0.05)
        found, expected = interval(ours), np.percentile(plain, [2.5, 97.5])
        assert [found.low, found.high] == pytest.approx(list(expected), abs=0.012)


def test_unpaired_draws_have_the_spread_of_two_samples() -> None:
    first, second = BEFORE == 0, AFTER == 0
    draws = difference_draws(parts(first), parts(second), paired=False, seed=0, name="t")
    expected = np.sqrt((first.var() + second.var()) / IMAGES)
    assert draws.std() == pytest.approx(expected, rel=0.05)
    paired = difference_draws(parts(first), parts(second), paired=True, seed=0, name="t")
    assert paired.std() < 0.8 * draws.std()
    assert np.array_equal(paired, difference_draws(parts(first), parts(second), paired=True, seed=0, name="t"))
    assert not np.array_equal(paired, difference_draws(parts(first), parts(second), paired=True, seed=1, name="t"))


def test_captions_are_drawn_with_their_image() -> None:
    hits, counts = np.array([5.0, 0.0] * 50), np.full(100, 5.0)  # all captions of an image agree
    worse = Parts(np.zeros(100), counts, np.zeros(100, np.int64))
    draws = difference_draws(worse, Parts(hits, counts, worse.groups), paired=True, seed=0, name="t")
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.std() == pytest.approx(np.sqrt(0.25 / 100), rel=0.05)  # as of 100 images, not of 500 captions


def test_compares_what_is_common(tmp_path: Path) -> None:
    auc = {"metric": "roc_auc"}
    a = write(tmp_path / "a", result("one", BEFORE), result("two", AFTER), result("auc", BEFORE, **auc))
    b = write(tmp_path / "b", result("one", AFTER), result("two", AFTER, samples="other"), result("more", BEFORE))
    c = write(tmp_path / "c", result("one", AFTER), result("two", AFTER), result("auc", BEFORE, **auc))
    both = compare([read_results(a), read_results(b)])
    one, two, mean = both.rows
    (other,) = one.others
    assert other.difference == pytest.approx((AFTER == 0).mean() - (BEFORE == 0).mean())
    assert other.interval.low < other.difference < other.interval.high
    assert (other.interval.low > 0, other.paired, other.note) == (True, True, None)  # it is never worse
    assert (two.others[0].paired, two.others[0].difference) == (False, 0)
    assert "not the same images" in two.others[0].note
    assert two.others[0].interval.low < 0 < two.others[0].interval.high
    assert mean.others[0].difference == pytest.approx(other.difference / 2)
    assert mean.others[0].interval is not None
    assert both.left_out == {a: ("auc",), b: ("more",)}

    one, two, ranking, mean = compare([read_results(a), read_results(c)]).rows
    assert (two.others[0].interval.low, two.others[0].interval.high) == (0, 0)  # paired with itself
    assert ranking.others[0].interval is None
    assert "roc_auc is not a mean over images" in ranking.others[0].note
    assert mean.others[0].interval is None
    assert "1 of 3 tasks have no interval" in mean.others[0].note


def test_poor_material_is_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", result("one", BEFORE))
    old = write(tmp_path / "old", result("one", AFTER, samples=None, outcomes=None))
    (row, _) = compare([read_results(a), read_results(old)]).rows
    assert row.others[0].interval is None
    assert f"no per-sample outcomes ({old})" in row.others[0].note
    stale = write(tmp_path / "stale", result("one", AFTER))
    (tmp_path / "stale/per_sample/one.npz").write_bytes((tmp_path / "a/per_sample/one.npz").read_bytes())
    (row, _) = compare([read_results(a), read_results(stale)]).rows
    assert f"of another run ({stale})" in row.others[0].note
    listed = write(tmp_path / "listed", result("one", AFTER, shortlist=64, prompts_hash="x"))
    (row, _) = compare([read_results(a), read_results(listed)]).rows
    assert row.others[0].note == "different class names, prompts or captions; only one is by shortlist"


def test_results_set_aside_keep_their_outcomes(tmp_path: Path) -> None:
    write(tmp_path / "a", result("one", BEFORE))
    write(tmp_path / "a", result("one", AFTER), precision="amp_bf16")
    previous, now = tmp_path / "a/results.previous.json", tmp_path / "a"
    (row, _) = compare([read_results(previous), read_results(now)]).rows
    assert row.others[0].paired
    assert row.others[0].interval.low > 0


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write(tmp_path / "a", result("one", BEFORE), result("two", AFTER))
    b = write(tmp_path / "b", result("one", AFTER), replace(result("two", AFTER), error="broken", values={}))
    c = write(tmp_path / "c", result("one", AFTER))
    assert program.main([a, f"{b}/results.json", c, "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    before, after = (100 * (ranks == 0).mean() for ranks in (BEFORE, AFTER))
    for words in (f"A: {a}", f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", f"{a}: not compared: two"):
        assert words in table
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {after - before:+.1f} |" in (tmp_path / "out/compare.md").read_text()
    assert program.main([a, f"{b}/results.json", c, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == json.loads((tmp_path / "out/compare.json").read_text())
    assert json.loads(printed)["rows"][0]["others"][0]["paired"] is True


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write(tmp_path / "a", result("one", BEFORE)), write(tmp_path / "b", result("two", BEFORE))
    (tmp_path / "broken.json").write_text("[]")
    for arguments, words in [
        ([a], "1 results to compare"),
        ([a, str(tmp_path / "gone")], "gone are not there"),
        ([a, str(tmp_path / "broken.json")], "broken.json is not a results file"),
        ([a, b], "have no task in common"),
        ([a, a, "--out", f"{a}/results.json"], "cannot be written"),
        ([a, a, "--seed", "-1"], "--seed -1"),
    ]:
        assert program.main(arguments) == EXIT_USER
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("value", ["x", None, [1], float("nan"), 1.5])
def test_a_value_that_is_no_fraction(tmp_path: Path, value: object, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "a", result("t", BEFORE))
    path = tmp_path / "a" / "results.json"
    stored = json.loads(path.read_text())
    stored["tasks"]["t"]["value"] = value
    path.write_text(json.dumps(stored))
    assert program.main([folder, folder]) == EXIT_USER
    assert f"t, top1: {value!r} is not a fraction" in capsys.readouterr().err


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", result("t", BEFORE))
    path = tmp_path / "a" / "results.json"
    stored = json.loads(path.read_text())
    stored["tasks"]["t"]["later"] = {"x": 1}
    path.write_text(json.dumps(stored))
    assert read_results(folder).tasks["t"].n == IMAGES
