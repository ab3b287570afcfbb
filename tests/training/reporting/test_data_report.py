"""What a run says about its data: counts, the slow stage, the table of damage."""

import logging
from collections import Counter

import pytest

from llip.data.worker_stats import LostShard, WorkerReport
from llip.errors import UserError
from llip.training.reporting.data_report import OTHERS, WORST, DataCounts, DataReport, sum_counts


def report(workers=2):
    return DataReport(["a", "b"], DataCounts([0, 0]), workers)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("llip"), "propagate", True)
    caplog.set_level(logging.INFO, "llip")
    return caplog


def test_counts_of_all_processes_are_added_and_stored():
    one, two = report(), report()
    one.add(WorkerReport([("x.tar", "no image", 2)], [3, 1], {}, 5 << 20), 0)
    two.add(WorkerReport([("y.tar", "no image", 1), ("y.tar", "no caption", 4)], [1, 1], {}, 0), 0)
    everyone = [one.counts.plain(WORST), two.counts.plain(WORST)]
    record = one.record(everyone, 0.0)
    assert (record["dropped_samples"], record["dropped"]) == (7, {"no image": 3, "no caption": 4})
    assert record["dataset_samples"] == [4, 2]
    assert record["worker_memory_mb"] == 5
    again = DataCounts([0, 0])
    again.restore(everyone)
    assert again == sum_counts(everyone)
    assert again.dropped == Counter({("x.tar", "no image"): 2, ("y.tar", "no image"): 1, ("y.tar", "no caption"): 4})


@pytest.mark.parametrize(
    ("seconds", "workers", "stage"),
    [
        ({"read": 5.0, "decode": 1.0, "tokenize": 1.0, "idle": 0.1}, 2, "read"),
        ({"read": 1.0, "decode": 5.0, "tokenize": 1.0, "idle": 0.1}, 2, "decode"),
        ({"read": 1.0, "decode": 1.0, "tokenize": 5.0, "idle": 0.1}, 2, "tokenize"),
        ({"read": 1.0, "decode": 2.0, "tokenize": 1.0, "idle": 9.0}, 2, "main_process"),
        ({"read": 1.0, "decode": 2.0, "tokenize": 1.0, "idle": 9.0}, 0, "decode"),  # idle is the training itself
    ],
)
def test_the_slow_stage_is_named_if_training_waits_for_data(said, seconds, workers, stage):
    one = report(workers)
    one.add(WorkerReport([], [1, 0], seconds, 0), 0)
    record = one.record([one.counts.plain(WORST)], 0.3)
    assert record["data_bottleneck"] == stage
    assert record["data_read_seconds"] == seconds["read"]
    one.explain(record, 0.3)
    one.explain(record, 0.3)
    assert said.text.count(f"the slowest stage is {stage}") == 1
    one.add(WorkerReport([], [1, 0], seconds, 0), 1)
    assert one.record([one.counts.plain(WORST)], 0.05)["data_bottleneck"] is None


def test_damage_is_logged_once_and_a_few_times_only(said):
    one = report()
    for number in range(40):
        for _ in range(2):
            one.add(WorkerReport([(f"{number}.tar", "not an image", 1)], [0, 0], {}, 0), number)
    assert len(said.records) == 11
    assert "dropping from 3.tar: not an image" in said.text
    said.clear()
    one.log_epoch([one.counts.plain(WORST)])
    assert "80 samples dropped so far" in said.text
    assert "and 20 more" in said.text
    assert said.text.count("not an image") == 20


def test_plain_counts_are_bounded_and_lose_no_sample():
    counts = DataCounts([5])
    for number in range(1000):
        counts.dropped[f"{number}.tar", "truncated tar" if number % 2 else "no image"] = number + 1
    for worst, rows in ((0, 2), (10, 12), (2000, 1000)):
        plain = counts.plain(worst)
        assert len(plain["dropped"]) == rows
        total = sum_counts([plain, plain])
        assert total.by_reason() == {reason: 2 * count for reason, count in counts.by_reason().items()}
    named = {shard: count for shard, _, count in counts.plain(10)["dropped"] if shard != OTHERS}
    assert named == {f"{number}.tar": number + 1 for number in range(990, 1000)}
    again = DataCounts([0])
    again.restore([counts.plain(10)])
    assert again.plain(5)["used"] == [5]
    assert len(again.plain(5)["dropped"]) == 7
    assert again.by_reason() == counts.by_reason()


def lose(url, dataset=0, read=0, stride=1, reason="shard is not there", detail=""):
    return WorkerReport(
        [(url, reason, 1)], [1, 1], {}, 0, [1, 1], [LostShard(dataset, url, reason, detail, 0, stride, read)]
    )


def test_lost_shards_end_the_run_beyond_the_limit_of_their_dataset():
    def judged(lost, good, limit):
        one = DataReport(["a", "b"], DataCounts([0, 0]), 0, [10, 1000], limit, {"5.tar": 7})
        for number in range(lost):
            one.add(lose(f"{number}.tar", read=number), 0)
        for _ in range(good):
            one.add(WorkerReport([], [1, 1], {}, 0, [1, 1]), 0)
        return one.record([one.counts.plain(0)], 0.0)

    assert judged(2, 0, 0.2)["lost_shards"] == 2
    assert judged(2, 0, 0.2)["dropped_samples"] == 0
    assert judged(6, 0, 0.6)["lost_samples"] == 2  # of 7 known ones 5 were read
    with pytest.raises(UserError, match=r"'a': 3 of 10 shards are lost.*shard is not there: 3.*: 0.tar, 1.tar, 2.tar;"):
        judged(3, 0, 0.2)
    with pytest.raises(UserError, match="'a': 7 of 30 shards"):
        judged(7, 23, 0.2)
    assert judged(6, 24, 0.2)["lost_shards"] == 6


def test_the_log_and_the_error_give_the_detail_of_a_lost_shard(said):
    one = DataReport(["a", "b"], DataCounts([0, 0]), 0, [1, 1], 0.2)
    one.add(lose("http://x/0.tar", reason="shard download failed", detail="HTTP status 500"), 0)
    assert "dropping from http://x/0.tar: shard download failed (HTTP status 500)" in said.text
    with pytest.raises(UserError, match=r"shard download failed: 1; the last ones: http://x/0.tar \(HTTP status 500\)"):
        one.record([one.counts.plain(0)], 0.0)


def test_shards_lost_after_many_good_epochs_count_by_their_own_epoch():
    one = DataReport(["a", "b"], DataCounts([0, 0]), 0, [10, 1000], 0.2)
    for _ in range(500):
        one.add(WorkerReport([], [1, 1], {}, 0, [1, 1]), 0)
    one.record([one.counts.plain(0)], 0.0)
    for number in range(3):
        one.add(lose(f"{number}.tar"), 0)
    with pytest.raises(UserError, match="3 of 10 shards"):
        one.record([one.counts.plain(0)], 0.0)
    again = DataCounts([0, 0])
    again.restore([one.counts.plain(WORST)])
    assert again == one.counts
    resumed = DataReport(["a", "b"], again, 0, [10, 1000], 0.2)
    resumed.record([again.plain(0)], 0.0)  # what was lost before does not end the run that follows
