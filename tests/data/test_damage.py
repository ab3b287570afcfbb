"""What the loader drops and counts, and when it gives up."""

import itertools
import struct
import time
import zlib
from pathlib import Path

import pytest

from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data
from tests.data.helpers import TOKENIZER, captions, config, dropped, good, loader, take
from tests.helpers import image_bytes, write_pairs, write_tar


def bomb():
    """A small PNG whose header claims 30,000 x 30,000 pixels."""
    data = image_bytes(0)
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


PICTURE = image_bytes(9, 200, "jpg")


@pytest.mark.parametrize(
    ("sample", "keys", "reason"),
    [
        ({"png": b"no image", "txt": b"x"}, "txt", "not an image"),
        ({"png": b"", "txt": b"x"}, "txt", "empty image"),
        ({"jpg": PICTURE[: len(PICTURE) // 2], "txt": b"x"}, "txt", "truncated image"),
        ({"png": bomb(), "txt": b"x"}, "txt", "image of too many pixels"),
        ({"txt": b"x"}, "txt", "no image"),
        ({"jpg": PICTURE}, "txt", "no caption"),
        ({"jpg": PICTURE, "txt": b"  "}, "txt", "no caption"),
        ({"jpg": PICTURE, "txt": b"\xff\xfe"}, "txt", "txt is not UTF-8"),
        ({"jpg": PICTURE, "txt": b"x" * 1_000_000}, "txt", "caption is too long"),
        ({"jpg": PICTURE, "txt": b"x" * 1_000_001}, "txt", "txt is too long"),
        ({"jpg": PICTURE, "json": b"{"}, "json.caption,txt", "json is not json"),
        ({"jpg": PICTURE, "json": b"[" * 100_000}, "json.caption,txt", "json is not json"),
        ({"jpg": PICTURE, "json": b"[1]"}, "json.caption,txt", "json is not an object"),
        (
            {"jpg": PICTURE, "json": b'{"caption": 3}'},
            "json.caption,txt",
            "json.caption is neither a string nor a list of strings",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_dropped_and_counted(tmp_path, sample, keys, reason):
    write_tar(tmp_path / "a.tar", [*good(0, 4), sample, *good(4, 4)])
    batches = take(3, config(str(tmp_path / "*.tar"), caption_keys=keys, max_bad_fraction=1.0))
    assert sorted(captions(batches[:2])) == list(range(8))
    assert dropped(batches)["a.tar", reason] in (1, 2)  # the third batch is of the second epoch
    assert dropped(batches).keys() == {("a.tar", reason)}


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:700])


def damage_no_tar(path):
    path.write_bytes(b"<html>not found</html>" * 100)


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncated, "truncated tar"),
        (damage_no_tar, "shard is not a tar"),
        (damage_empty, "shard has zero bytes"),
        (Path.unlink, "shard is not there"),
    ],
)
def test_a_damaged_shard_does_not_stop_the_others(tmp_path, damage, reason):
    pattern = write_pairs(tmp_path, 32, 16)
    damage(tmp_path / "00000.tar")
    batches = take(5, config(pattern))
    assert sorted(captions(batches[:4])) == list(range(16, 32))
    assert dropped(batches).keys() == {("00000.tar", reason)}


def test_duplicate_members_are_one_sample_less(tmp_path):
    write_tar(tmp_path / "a.tar", [*good(0, 4), *good(8, 2), *good(4, 4)], [*"abcd", "same", "same", *"fghi"])
    batches = take(3, config(str(tmp_path / "a.tar")))
    assert sorted(captions(batches[:2])) == list(range(8))
    assert dropped(batches).keys() == {("a.tar", "duplicate member")}


def test_a_shard_that_disappears_between_epochs(tmp_path):
    pattern = write_pairs(tmp_path, 32, 8)
    batches = iter(loader(config(pattern, max_bad_fraction=0.5)))
    first = list(itertools.islice(batches, 8))
    (tmp_path / "00001.tar").unlink()
    # the next few epochs have been read ahead
    later = list(itertools.islice(batches, 48))
    assert sorted(captions(first)) == list(range(32))
    assert dropped(later)["00001.tar", "shard is not there"] >= 1
    assert not any(batch.error for batch in later)


def test_a_command_that_fails_costs_its_shard(tmp_path):
    write_pairs(tmp_path, 16, 8)
    batches = take(5, config(f"pipe:cat {tmp_path}/0000{{0..2}}.tar", max_bad_fraction=0.5))
    assert sorted(captions(batches[:4])) == list(range(16))
    assert {reason for _, reason in dropped(batches)} == {"shard command failed"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_silent_command_is_left_and_named(tmp_path, workers):
    started = time.monotonic()
    write_pairs(tmp_path, 16, 8)
    command = f"pipe:cd {tmp_path}; N=0000{{0..2}}; test $N = 00002 && sleep 60; cat $N.tar"
    settings = config(command, workers=workers, max_bad_fraction=1.0)
    dataset = CaptionedImages(settings, parse_train_data(command), TOKENIZER, 32, DataPosition(workers), deadline=0.5)
    batches = list(itertools.islice(make_loader(dataset, pin=False), 5))
    assert sorted(captions(batches[:4])) == list(range(16))
    assert {reason for _, reason in dropped(batches)} == {"shard stalled"}
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_keys_end_with_what_was_found(tmp_path, workers):
    write_tar(tmp_path / "a.tar", [{"png": image_bytes(i), "caption": b"x"} for i in range(6)])
    (batch,) = take(1, config(str(tmp_path / "a.tar"), workers=workers))
    assert "wanted an image (jpg, jpeg, png, webp) and a caption (txt)" in batch.error
    assert "caption, png" in batch.error
    assert "no caption: 6" in batch.error


def test_too_many_bad_samples_name_the_worst_shard(tmp_path):
    write_pairs(tmp_path, 200, 100)
    write_tar(tmp_path / "worst.tar", [{"png": b"x", "txt": b"x"}] * 100, [f"w{i}" for i in range(100)])
    batches = take(60, config(str(tmp_path / "*.tar"), max_bad_fraction=0.2))
    assert batches[-1].error
    assert "max_bad_fraction = 0.2" in batches[-1].error
    assert "worst.tar" in batches[-1].error


def test_one_lost_shard_of_many_worker_slots_is_no_reason_to_stop(tmp_path):
    """A worker slot whose only shard is damaged has other shards in the next epoch."""
    pattern = write_pairs(tmp_path, 32, 8)
    (tmp_path / "00002.tar").write_bytes(b"")
    for rank in range(4):
        batches = take(6, config(pattern), rank, 4)
        assert [batch.error for batch in batches] == [""] * 6


def test_nothing_usable_ends_early_however_much_there_is(tmp_path):
    write_tar(tmp_path / "a.tar", [{"png": image_bytes(0), "text": b"x"}] * 300, [str(i) for i in range(300)])
    (batch,) = take(1, config(str(tmp_path / "a.tar"), max_bad_fraction=1.0))
    assert "the first 200 samples" in batch.error
    assert "wanted an image (jpg, jpeg, png, webp) and a caption (txt)" in batch.error
    assert "member names seen: png, text" in batch.error
