"""When a worker gives up, and in which words."""

import time
from collections import Counter

import pytest

from llip.data import worker_stats as counting
from llip.data.worker_stats import WorkerStats, resident_bytes
from llip.errors import UserError


def test_too_many_bad_samples_name_reasons_and_shards():
    stats = WorkerStats(0.1, 1, "an image")
    for _ in range(180):
        stats.use(0)
    for number in range(19):
        stats.drop("not an image", f"shard{number % 2}", ["png", "__key__"])
    stats.drop("no image", "shard0")  # 20 of 200 are not more than a tenth
    with pytest.raises(
        UserError, match=r"0\.1 .*: 21 of 201; dropped not an image: 20, no image: 1; worst shards: shard0"
    ):
        stats.drop("not an image", "shard0", ["png", "__key__"])


def test_nothing_usable_is_reported_by_number_and_by_time(monkeypatch):
    stats = WorkerStats(1.0, 1, "an image")
    bad = Counter({("a.tar", "no image"): 199})
    stats.check_start(bad, ["text"])
    bad["a.tar", "no image"] += 1
    with pytest.raises(UserError, match=r"first 200 samples.*wanted an image; dropped no image: 200.*seen: text"):
        stats.check_start(bad)
    monkeypatch.setattr(counting, "FIRST_DEADLINE", 0.01)
    late = WorkerStats(1.0, 1, "an image")
    time.sleep(0.02)
    with pytest.raises(UserError, match="first 1 samples"):
        late.drop("shard stalled", "b.tar")
    used = WorkerStats(1.0, 1, "an image")
    used.use(0)
    time.sleep(0.02)
    used.drop("shard stalled", "b.tar")


def test_reports_count_what_is_new():
    stats = WorkerStats(1.0, 2, "an image")
    stats.use(1)
    stats.drop("no image", "a.tar")
    stats.seconds["read"] += 2.0
    first = stats.report()
    assert (first.dropped, first.used, first.seconds) == ([("a.tar", "no image", 1)], [0, 1], {"read": 2.0})
    stats.drop("no image", "a.tar")
    stats.use(0)
    second = stats.report()
    assert (second.dropped, second.used, second.seconds) == ([("a.tar", "no image", 1)], [1, 0], {})


def test_memory_is_that_of_this_process():
    before = resident_bytes()
    ballast = bytearray(b"x" * (64 << 20))
    assert 60 << 20 < resident_bytes() - before < 80 << 20
    assert ballast


def test_a_batch_that_takes_too_long_names_the_shard():
    stats = WorkerStats(1.0, 1, "an image")
    stats.check_pace("a.tar")
    stats.batch_began -= counting.SLOW_DEADLINE + 1
    with pytest.raises(UserError, match=r"no batch in 151 s.*'a\.tar' is being read"):
        stats.check_pace("a.tar")
