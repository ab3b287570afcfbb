"""Samples of shards without an index: counted at the start, within bounds, and kept where that took long."""

import functools
import gzip
import logging
import os
import threading
import time

import pytest

from llip.configs import Config
from llip.data import check
from llip.data.index import INDEX_NAME, load_index
from llip.data.prefetch import read_ahead
from llip.data.sources import parse_train_data
from llip.errors import UserError
from tests.helpers import image_bytes, write_pairs, write_tar


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("llip"), "propagate", True)
    caplog.set_level(logging.INFO, "llip")
    return caplog


def run_check(pattern, **changes):
    config = Config(train_data=pattern, batch_size=2, workers=1, train_num_samples=20, epochs=3, **changes)
    check.check_data(config, parse_train_data(pattern))


def test_short_counting_leaves_no_file(tmp_path, said, monkeypatch):
    monkeypatch.setattr(check, "_WORTH_AN_INDEX", 60.0)
    pattern = write_pairs(tmp_path, 23, 10)
    run_check(pattern)
    assert "data: 23 samples;" in said.text
    assert not (tmp_path / INDEX_NAME).exists()


def test_long_counting_is_paid_once(tmp_path, said, monkeypatch):
    monkeypatch.setattr(check, "_WORTH_AN_INDEX", 0.0)
    pattern = write_pairs(tmp_path, 23, 10)
    run_check(pattern)
    urls = parse_train_data(pattern).urls
    assert load_index(urls) == dict(zip(urls, (10, 10, 3), strict=True))
    monkeypatch.setattr(check, "_COUNT_SECONDS", -1.0)
    said.clear()
    run_check(pattern)
    assert "data: 23 samples;" in said.text


def test_counting_ends_when_the_time_is_up_and_continues_at_the_next_start(tmp_path, said, monkeypatch):
    monkeypatch.setattr(check, "_WORTH_AN_INDEX", 0.0)
    monkeypatch.setattr(check, "_COUNT_SECONDS", -1.0)  # one shard each time: the first item ends it
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [])
    for missing in (2, 1):
        said.clear()
        run_check(f"{tmp_path}/*.tar")
        assert f"data: {missing} shards are not counted; run `llip doctor" in said.text


def test_one_large_shard_does_not_hold_up_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_COUNT_SECONDS", 0.2)
    slow = check.read_samples

    def read_slowly(*arguments, **keywords):
        for item in slow(*arguments, **keywords):
            time.sleep(0.05)
            yield item

    monkeypatch.setattr(check, "read_samples", read_slowly)
    write_tar(tmp_path / "0.tar", [{"txt": b"x"}] * 200, [str(i) for i in range(200)])
    started = time.monotonic()
    run_check(f"{tmp_path}/0.tar")
    assert time.monotonic() - started < 3
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(3)
            assert not thread.is_alive()


def test_a_folder_that_takes_no_index_is_no_error(tmp_path, said, monkeypatch):
    monkeypatch.setattr(check, "_WORTH_AN_INDEX", 0.0)
    (tmp_path / INDEX_NAME).mkdir()
    run_check(write_pairs(tmp_path, 20, 10))
    assert "data: 20 samples;" in said.text
    assert "will be counted again at the next start: index: cannot write" in said.text


def test_damaged_shards_count_up_to_the_damage_and_are_not_kept(tmp_path, said, monkeypatch):
    monkeypatch.setattr(check, "_WORTH_AN_INDEX", 0.0)
    pattern = write_pairs(tmp_path, 20, 10)
    os.truncate(tmp_path / "00000.tar", 512 * 10)
    run_check(pattern)
    urls = parse_train_data(pattern).urls
    assert load_index(urls) == {urls[1]: 10}
    assert "data: 12 samples;" in said.text


def test_samples_are_counted_whatever_they_hold(tmp_path, said):
    samples = [{"png": image_bytes(0), "seg.png": image_bytes(1), "txt": b"x"}, {"txt": b"no image"}]
    path = write_tar(tmp_path / "0.tar", samples)
    (tmp_path / "1.tar").write_bytes(gzip.compress(path.read_bytes()))
    run_check(f"{tmp_path}/*.tar")
    assert "data: 4 samples;" in said.text


def test_a_file_that_hangs_is_named(tmp_path, monkeypatch):
    def hang(url, watch, **_):
        watch.begin(url, None)
        time.sleep(1.5)
        yield from ()

    monkeypatch.setattr(check, "read_samples", hang)
    monkeypatch.setattr(check, "read_ahead", functools.partial(read_ahead, deadline=0.3))
    with pytest.raises(UserError, match=r"nothing could be read from .*00000\.tar"):
        run_check(write_pairs(tmp_path, 4, 4))
