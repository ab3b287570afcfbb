"""Reading ahead: nothing changes by it, and what is silent is named in time."""

import io
import os
import tarfile
import threading
import time

import pytest

from llip.data import tar_reader as reading
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.tar_reader import Damage, read_samples
from llip.errors import UserError


def write_shard(path, count, first=0):
    """Write a shard of `count` samples of about a kilobyte each."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            info = tarfile.TarInfo(f"{i:04d}.jpg")
            info.size = 700 + i
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    return str(path)


def keys(items):
    return [item["__key__"] for item in items if not isinstance(item, Damage)]


def shards_ahead(urls, watch, deadline):
    return read_ahead((item for url in urls for item in read_samples(url, watch=watch)), watch, deadline)


def test_reading_ahead_changes_nothing(tmp_path):
    paths = [write_shard(tmp_path / f"{i}.tar", 70, i) for i in range(3)]
    paths.insert(1, str(tmp_path / "none.tar"))
    ahead = list(shards_ahead(paths, ReadWatch(), 20.0))
    assert ahead == [item for path in paths for item in read_samples(path)]
    assert [index for index, item in enumerate(ahead) if isinstance(item, Damage)] == [70]


@pytest.mark.slow
def test_a_silent_command_is_ended_and_the_next_shard_read(tmp_path):
    path, good = (write_shard(tmp_path / f"{i}.tar", 40) for i in range(2))
    silent = f"pipe:head -c 20000 {path}; sleep 60 | cat"
    started = time.monotonic()
    received = list(shards_ahead([silent, good], ReadWatch(), 1.0))
    assert 1 <= time.monotonic() - started < 8
    assert [item for item in received if isinstance(item, Damage)] == [Damage(silent, reading.STALLED)]
    cut = keys(received)[:-40]
    assert cut == keys(read_samples(path))[: len(cut)]
    assert 5 < len(cut) < 25
    assert keys(received)[-40:] == keys(read_samples(good))


@pytest.mark.slow
def test_a_hung_file_is_named_within_the_deadline(tmp_path):
    fifo = tmp_path / "hung.tar"  # nobody writes: opening it blocks like a hung mount
    os.mkfifo(fifo)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"nothing could be read from .*hung\.tar.* for 1 s"):
        list(shards_ahead([str(fifo)], ReadWatch(), 1.0))
    assert time.monotonic() - started < 5
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # lets the reading thread go


@pytest.mark.slow
def test_a_slow_consumer_is_not_a_stall(tmp_path):
    path = write_shard(tmp_path / "a.tar", 150)
    items, received = shards_ahead([path], ReadWatch(), 0.5), []
    for item in items:
        if len(received) in (0, 97):
            time.sleep(1.2)
        received.append(item)
    assert received == list(read_samples(path))


def test_errors_of_the_thread_reach_the_consumer_in_order():
    def items():
        yield from range(40)
        raise UserError("no")

    received = []
    with pytest.raises(UserError, match="no"):
        received.extend(iter_into(read_ahead(items(), ReadWatch()), received))
    assert received == list(range(40))


def iter_into(items, received):
    for item in items:
        received.append(item)
    return ()


def test_leaving_early_ends_the_thread(tmp_path):
    path = write_shard(tmp_path / "a.tar", 400)
    before = threading.active_count()
    items = shards_ahead([f"pipe:cat {path}; sleep 60"] * 3, ReadWatch(), 30.0)
    next(items)
    items.close()
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.05)
    raise AssertionError("the reading thread lives on")


def test_the_first_item_has_a_deadline_of_its_own():
    go_on = threading.Event()

    def silent():
        go_on.wait(30)
        yield from ()

    watch = ReadWatch()
    watch.begin("slow.tar", None)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"'slow\.tar' for 0 s"):
        list(read_ahead(silent(), watch, 60.0, first=0.3))
    go_on.set()
    assert time.monotonic() - started < 10
