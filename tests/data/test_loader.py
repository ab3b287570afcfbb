"""Shards to batches: what is read, in which order, what is dropped, and what a restart sees."""

import copy
import itertools
import json
import shutil
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from llip.configs import Config
from llip.data.captions import BadSample, choose_caption, parse_caption_keys
from llip.data.loader import make_loader
from llip.data.position import DataPosition, Layout, reshard
from llip.data.sources import check_shards_exist, parse_train_data, shard_name
from llip.errors import UserError
from llip.open_clip.factory import get_tokenizer
from tests.helpers import image_bytes, write_pairs, write_tar

TOKENIZER = get_tokenizer(context_length=12)


def loader(config, rank=0, processes=1, position=None):
    return make_loader(
        config,
        parse_train_data(config.train_data),
        TOKENIZER,
        32,
        rank,
        processes,
        position or DataPosition(config.workers),
        pin=False,
    )


def config(pattern, **changes):
    return Config(train_data=pattern, **{"batch_size": 4, "workers": 0, **changes})


def captions(batches):
    """The numbers in the captions `picture number <i> of all`, which name the samples."""
    text = (TOKENIZER.decode([t for t in row.tolist() if t]) for batch in batches for row in batch.tokens)
    return [int(line.split("number")[1].split("of")[0].replace(" ", "")) for line in text]


def take(count, *arguments, **keywords):
    return list(itertools.islice(iter(loader(*arguments, **keywords)), count))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("per_shard", [4, 48])  # whole shards are dealt out; shards are split
def test_one_pass_visits_every_sample_once(tmp_path, workers, per_shard):
    pattern = write_pairs(tmp_path, 48, per_shard)
    seen = []
    for rank in range(2):
        batches = take(6, config(pattern, workers=workers, batch_size=4), rank, 2)
        assert not any(batch.error for batch in batches)
        seen += captions(batches)
    if workers < 3 or per_shard == 48:  # 12 shards over 6 readers is even too
        assert sorted(seen) == list(range(48))
    assert len(set(seen)) == 48


def test_seed_decides_and_pass_reshuffles(tmp_path):
    pattern = write_pairs(tmp_path, 16, 4)
    first, again = take(8, config(pattern)), take(8, config(pattern))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
    assert captions(take(4, config(pattern, seed=1))) != captions(first[:4])
    assert captions(first[:4]) != captions(first[4:])
    crops = [
        dict(zip(captions(part), torch.cat([b.images for b in part]), strict=True)) for part in (first[:4], first[4:])
    ]
    assert not all(torch.equal(crops[0][key], crops[1][key]) for key in crops[0])


def test_crops_do_not_depend_on_workers(tmp_path):
    pattern = write_pairs(tmp_path, 16, 4)
    by_key = []
    for workers in (0, 2):
        batches = take(4, config(pattern, workers=workers))
        by_key.append(dict(zip(captions(batches), torch.cat([b.images for b in batches]), strict=True)))
    assert by_key[0].keys() == by_key[1].keys()
    for key, image in by_key[0].items():
        assert torch.equal(image, by_key[1][key])


def test_captions_depend_neither_on_workers_nor_on_shards_and_crops_not_on_captions(tmp_path):
    samples = [
        {
            "png": image_bytes(i),
            "json": json.dumps({"c": [f"number {i}{j} of" for j in range(5)], "d": f"number {i}9 of"}).encode(),
        }
        for i in range(10, 26)
    ]
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", samples[4 * number : 4 * number + 4])
    drawn = []
    for changes in ({}, {"workers": 2}, {"shuffle_buffer": 2}, {"caption_keys": "json.d"}):
        settings = config(f"{tmp_path}/*.tar", **{"caption_keys": "json.c", "log_sample_ids": True, **changes})
        batches = take(4, settings)
        images = torch.cat([batch.images for batch in batches])
        drawn.append(dict(zip(ids(batches), zip(captions(batches), images, strict=True), strict=True)))
    assert len({caption % 10 for caption, _ in drawn[0].values()}) > 2
    for other in drawn[1:]:
        assert other.keys() == drawn[0].keys()
        assert all(torch.equal(other[key][1], drawn[0][key][1]) for key in other)
    for other in drawn[1:3]:
        assert all(other[key][0] == drawn[0][key][0] for key in other)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_restart_sees_what_an_uninterrupted_run_sees(tmp_path, workers, stop):
    pattern = write_pairs(tmp_path, 30, 5)
    settings = config(pattern, workers=workers, batch_size=3)
    straight = take(12, settings)
    position = DataPosition(workers)
    for batch in straight[:stop]:
        position.advance(batch.cursor)
    resumed = take(12 - stop, settings, position=DataPosition(**vars(position)))
    assert captions(resumed) == captions(straight[stop:])
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, straight[stop:], strict=True))


def test_loading_here_leaves_the_random_state_alone(tmp_path):
    batches = iter(loader(config(write_pairs(tmp_path, 8))))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    next(batches)
    assert torch.equal(torch.rand(1), expected)


def dropped(batches):
    """(shard's name, reason) -> samples, over the batches."""
    found = Counter()
    for batch in batches:
        for shard, reason, count in batch.report.dropped:
            found[shard_name(shard), reason] += count
    return found


def good(first, count):
    return [{"png": image_bytes(i), "txt": b"picture number %d of all" % i} for i in range(first, first + count)]


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
    assert dropped(batches)["a.tar", reason] in (1, 2)  # the third batch is of the second pass
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


def test_a_shard_that_disappears_between_passes(tmp_path):
    pattern = write_pairs(tmp_path, 32, 8)
    batches = iter(loader(config(pattern, max_bad_fraction=0.5)))
    first = list(itertools.islice(batches, 8))
    (tmp_path / "00001.tar").unlink()
    # the next few passes have been read ahead
    later = list(itertools.islice(batches, 48))
    assert sorted(captions(first)) == list(range(32))
    assert dropped(later)["00001.tar", "shard is not there"] >= 1
    assert not any(batch.error for batch in later)


def test_a_command_that_fails_costs_its_shard(tmp_path):
    write_pairs(tmp_path, 16, 8)
    batches = take(5, config(f"pipe:cat {tmp_path}/0000{{0..2}}.tar", max_bad_fraction=0.5))
    assert sorted(captions(batches[:4])) == list(range(16))
    assert {reason for _, reason in dropped(batches)} == {"shard command failed"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_silent_command_is_left_and_named(tmp_path, workers):
    started = time.monotonic()
    write_pairs(tmp_path, 16, 8)
    command = f"pipe:cd {tmp_path}; N=0000{{0..2}}; test $N = 00002 && sleep 60; cat $N.tar"
    settings = config(command, workers=workers, max_bad_fraction=1.0)
    batches = iter(
        make_loader(settings, parse_train_data(command), TOKENIZER, 32, 0, 1, DataPosition(workers), False, 0.5)
    )
    batches = list(itertools.islice(batches, 5))
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


def test_train_data_forms(tmp_path, monkeypatch):
    pattern = write_pairs(tmp_path / "a", 12, 4)
    write_pairs(tmp_path / "b", 4, 4)
    monkeypatch.setenv("DATA", str(tmp_path))
    assert [len(s.urls) for s in parse_train_data(pattern).sources] == [3]
    assert [len(s.urls) for s in parse_train_data(f"{tmp_path}/a/*.tar").sources] == [3]
    assert [len(s.urls) for s in parse_train_data("$DATA/a/00000.tar,${DATA}/b/00000.tar").sources] == [2]
    assert [len(s.urls) for s in parse_train_data("${NONE:-" + str(tmp_path) + "}/a/*.tar").sources] == [3]
    mixture = parse_train_data(f"{tmp_path}/a/*.tar@0.7::{tmp_path}/b/*.tar@0.3")
    assert [(len(s.urls), s.weight) for s in mixture.sources] == [(3, 0.7), (1, 0.3)]
    assert parse_train_data("pipe:cat {000..002}.tar").urls == tuple(f"pipe:cat 00{i}.tar" for i in range(3))


def test_weighted_mixture_is_drawn_by_weight(tmp_path):
    write_pairs(tmp_path / "a", 8, 8)
    write_tar(tmp_path / "b" / "0.tar", [{"png": image_bytes(i), "txt": b"picture number 99 of all"} for i in range(8)])
    batches = take(100, config(f"{tmp_path}/a/*.tar@0.75::{tmp_path}/b/*.tar@0.25"))
    share = captions(batches).count(99) / 400
    assert 0.18 < share < 0.32


def test_pipe_urls_are_read(tmp_path):
    write_pairs(tmp_path, 4)
    assert sorted(captions(take(1, config(f"pipe:cat {tmp_path}/00000.tar")))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("train_data", "message"),
    [
        ("", "train_data is empty"),
        ("nowhere/*.tar", "matches no file"),
        ("nowhere/{00..03}.tar", "4 of 4 shards are missing"),
        ("s3://bucket/{0..1}.tar", "pipe:aws s3 cp"),
        ("a.tar@0::b.tar@0", "weight 0"),
        ("d/{00000..00007.tar", "unbalanced braces"),
        ("/tmp", r"'/tmp' is a folder; expected shards, for instance '/tmp/\*\.tar'"),
    ],
)
def test_bad_train_data(train_data, message):
    with pytest.raises(UserError, match=message):
        check_shards_exist(parse_train_data(train_data))


def test_empty_shards_are_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match=r"1 of 1 shards are empty files.*0\.tar"):
        check_shards_exist(parse_train_data(str(tmp_path / "0.tar")))


def draw(sample, keys, count=1):
    import random

    sources = parse_caption_keys(keys)
    return [choose_caption(sample, sources, random.Random(i)) for i in range(count)]


def test_captions_by_weight_and_fallback():
    sample = {"txt": b"t", "json": json.dumps({"captions": ["a", "b", ""], "alt": "one string", "n": 3}).encode()}
    assert set(draw(sample, "json.captions", 30)) == {"a", "b"}
    assert draw(sample, "json.alt") == ["one string"]  # one caption, not its characters
    assert draw(sample, "json.missing,txt") == ["t"]
    assert draw(sample, "json.missing:1,txt:0") == ["t"]
    share = draw(sample, "json.captions:0.7,txt:0.3", 500).count("t") / 500
    assert 0.22 < share < 0.38
    with pytest.raises(BadSample, match=r"json\.n is neither"):
        draw(sample, "json.n")
    with pytest.raises(BadSample, match="json is not json"):
        draw({"json": b"{"}, "json.captions")
    with pytest.raises(BadSample, match="no caption"):
        draw({"txt": b" "}, "txt")


@pytest.mark.parametrize("keys", ["", "json", "txt.a", "json.captions:x", "txt:0", "json.a:-1", "txt:inf", "txt:nan"])
def test_bad_caption_keys(keys):
    with pytest.raises(UserError, match="caption_keys"):
        parse_caption_keys(keys)


def ids(batches):
    return [name for batch in batches for name in batch.ids]


def test_the_order_does_not_depend_on_where_the_shards_lie(tmp_path):
    pattern = write_pairs(tmp_path / "here", 24, 4)
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where")
    settings = config(pattern, log_sample_ids=True)
    first = take(8, settings)
    listed = ",".join(str(path) for path in sorted((tmp_path / "else" / "where").glob("*.tar"), reverse=True))
    for other in (f"{tmp_path}/else/where/*.tar", listed, f"pipe:cat {tmp_path}/here/{{00000..00005}}.tar"):
        batches = take(8, settings.replace(train_data=other))
        if not other.startswith("pipe"):
            assert ids(batches) == ids(first)
            assert all(torch.equal(a.images, b.images) for a, b in zip(batches, first, strict=True))
        assert captions(batches) == captions(first)
    assert len(set(ids(first)[:24])) == 24


def test_a_restart_in_another_topology_repeats_and_leaves_out_nothing(tmp_path):
    pattern = write_pairs(tmp_path, 90, 9)
    settings = config(pattern, batch_size=3, shuffle_buffer=7)
    layout = Layout(settings.seed, settings.shuffle_buffer, [10])
    seen, positions = [], [DataPosition(2), DataPosition(2)]
    for processes, workers, steps in [(2, 2, 4), (1, 3, 5), (3, 1, 3), (4, 2, 1), (1, 1, 18)]:
        settings = settings.replace(workers=workers)
        if seen:
            positions = reshard(positions, layout, processes, workers)
        for rank in range(processes):
            for batch in take(steps, settings, rank, processes, position=copy.deepcopy(positions[rank])):
                assert not batch.error
                positions[rank].advance(batch.cursor)
                seen += captions([batch])
        positions = [
            DataPosition.from_plain(json.loads(json.dumps(p.plain()), object_hook=int_keys)) for p in positions
        ]
    counts = Counter(seen)
    assert len(seen) == 3 * (8 + 5 + 9 + 4 + 18)
    assert set(counts) == set(range(90))  # the first pass is over, each sample came
    assert max(counts.values()) <= 2  # and none came twice before it was


def int_keys(record):
    return {int(key) if key.isdecimal() else key: value for key, value in record.items()}


def test_a_restart_reads_again_only_what_it_needs(tmp_path):
    """Shards that are over are neither opened nor missed, except those that the buffer still held samples of."""
    pattern = write_pairs(tmp_path, 120, 4)
    settings = config(pattern, shuffle_buffer=2)
    straight = take(30, settings)
    position = DataPosition(0)
    for batch in straight[:24]:
        position.advance(batch.cursor)
    held = set(captions(straight[24:]))
    for number in range(30):
        if held.isdisjoint(range(4 * number, 4 * number + 4)):
            (tmp_path / f"{number:05d}.tar").unlink()
    resumed = take(6, settings, position=position)
    assert captions(resumed) == captions(straight[24:])
    assert not dropped(resumed)


def test_a_restart_says_when_a_held_sample_is_gone(tmp_path):
    pattern = write_pairs(tmp_path, 40, 20)
    settings = config(pattern, shuffle_buffer=30, max_bad_fraction=1.0)
    straight = take(10, settings)
    position = DataPosition(0)
    position.advance(straight[0].cursor)
    for path in tmp_path.glob("*.tar"):
        write_tar(path, good(0, 1))
    resumed = take(1, settings, position=position)
    used = set(captions(straight[:1]))
    assert sum(dropped(resumed).values()) == 34 - len(used | {0, 20})  # of those that the buffer has met
    assert {reason for _, reason in dropped(resumed)} == {"sample is not there any more"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_resumes(tmp_path, workers):
    write_pairs(tmp_path / "a", 30, 5)
    write_pairs(tmp_path / "b", 8, 2)
    settings = config(
        f"{tmp_path}/a/*.tar@0.7::{tmp_path}/b/*.tar@0.3", workers=workers, shuffle_buffer=4, log_sample_ids=True
    )
    straight = take(24, settings)
    assert sum(sum(batch.report.used) for batch in straight) == 96
    position = DataPosition(workers)
    for batch in straight[:11]:
        position.advance(batch.cursor)
    assert ids(take(13, settings, position=position)) == ids(straight[11:])


def test_memory_of_a_worker_is_flat_over_epochs(tmp_path):
    write_tar(tmp_path / "a.tar", [{"jpg": image_bytes(i, 300, "jpg"), "txt": b"picture %d" % i} for i in range(200)])
    batches = take(100, config(str(tmp_path / "a.tar"), workers=1, batch_size=10, shuffle_buffer=50))
    memory = [batch.report.memory for batch in batches]
    assert min(memory) > 0
    assert max(memory[80:]) - max(memory[20:40]) < 8 << 20  # the fifth epoch against the second


def test_uneven_shards_keep_all_readers_going(tmp_path):
    for number, samples in enumerate((1, 17, 2, 30)):
        write_tar(tmp_path / f"{number}.tar", good(100 * number, samples))
    for rank in range(2):
        batches = take(40, config(str(tmp_path / "*.tar"), workers=2), rank, 2)
        assert len(batches) == 40
        assert not any(batch.error for batch in batches)


def test_one_lost_shard_of_many_readers_is_no_reason_to_stop(tmp_path):
    """A reader whose only shard is damaged has other shards in the next pass."""
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
