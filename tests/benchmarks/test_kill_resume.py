"""The killer itself, on programs that stand in for a run."""

import os
import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks import kill_resume
from benchmarks.kill_resume import KINDS, Launched, Outcome, is_good, kill_once, stop_writing, table, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc"),
]

FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep({child})"])
time.sleep(60)
"""
WRITER = """
import os, sys, time
path = sys.argv[1]
time.sleep(0.3)
for number in range(1000):  # in its place at once, but for every third
    with open(path, "w"):
        time.sleep(0.5 if number % 3 == 2 else 0)
    os.replace(path, path + ".done")
    time.sleep(0.02)
"""


def outcome(**changes) -> Outcome:
    fields = {"processes": 2, "kills": dict.fromkeys(KINDS, 1), "steps": 9, "repeated_steps": 1, "different_losses": 0,
              "different_weights": 0, "survivors": 0, "seconds": 1.0}  # fmt: skip
    return Outcome(**fields | changes)


def test_a_benchmark_is_good_when_all_kills_came_and_nothing_differs_or_stays():
    assert KINDS == ("tree", "launcher", "writing", "start")
    assert is_good(outcome(), 4)
    assert not is_good(outcome(), 5), "a run that ended before its last kill proves less"
    for name in ("different_losses", "different_weights", "survivors"):
        assert not is_good(outcome(**{name: 1}), 4)


def test_the_table_has_a_column_for_each_kind():
    head, row = table([outcome(kills={"tree": 3, "launcher": 2, "writing": 1, "start": 0})]).splitlines()
    assert "kills (tree, launcher, writing, start)" in head
    assert "6 (3, 2, 1, 0)" in row
    assert len(head) == len(row)


@pytest.mark.parametrize(("child", "survivors"), [(0.1, 0), (60, 1)])
def test_a_run_is_killed_while_it_starts_and_who_stays_is_counted(tmp_path, monkeypatch, child, survivors):
    monkeypatch.setattr(kill_resume, "START_MOMENTS", (0.4, 0.6))
    monkeypatch.setattr(kill_resume, "_GONE", 1.0)
    command = [sys.executable, "-c", FAMILY.format(child=child)]
    began = time.monotonic()
    assert kill_once(command, tmp_path / "run", "start", random.Random(0), 6) == (True, survivors)
    assert 0.4 < time.monotonic() - began < 20


def test_a_run_that_has_ended_is_not_counted_as_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_resume, "START_MOMENTS", (20.0, 20.0))
    began = time.monotonic()
    assert kill_once([sys.executable, "-c", ""], tmp_path / "run", "start", random.Random(0), 6) == (False, 0)
    assert time.monotonic() - began < 15


def test_a_run_is_stopped_in_the_middle_of_writing(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    path = folder / "checkpoints" / "writing.tmp"
    path.touch()  # an earlier start's
    os.utime(path, (time.time() - 60,) * 2)
    launched = Launched([sys.executable, "-c", WRITER, str(path)], tmp_path / "log.txt")
    try:
        assert stop_writing(launched, folder, 20)
        assert path.stat().st_mtime > launched.began
        before = path.stat().st_mtime_ns
        time.sleep(0.7)  # longer than it writes
        assert path.stat().st_mtime_ns == before, "it stands still"
        assert Path(f"/proc/{launched.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    finally:
        assert launched.kill("tree") == 0


def test_a_file_that_an_earlier_start_has_left_is_not_being_written(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    path = folder / "checkpoints" / "writing.tmp"
    path.touch()
    os.utime(path, (time.time() - 60,) * 2)
    launched = Launched([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt")
    try:
        assert wait_for(lambda: launched.members() != [], 5)
        assert not stop_writing(launched, folder, 0.5)
    finally:
        launched.kill("tree")
