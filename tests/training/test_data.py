"""Shards to batches: what is read, in which order, what is dropped, and what a restart sees."""

import itertools
import json

import pytest
import torch

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import get_tokenizer
from llip.training.captions import BadSample, choose_caption, parse_caption_keys
from llip.training.data import DataPosition, make_loader
from llip.training.shards import Reader, check_shards_exist, parse_train_data
from tests.helpers import image_bytes, write_pairs, write_tar

TOKENIZER = get_tokenizer(context_length=12)


def loader(config, rank=0, processes=1, position=None):
    return make_loader(config, TOKENIZER, 32, rank, processes, position or DataPosition(config.workers), pin=False)


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


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_restart_sees_what_an_uninterrupted_run_sees(tmp_path, workers, stop):
    pattern = write_pairs(tmp_path, 30, 5)
    settings = config(pattern, workers=workers, batch_size=3)
    straight = take(12, settings)
    position = DataPosition(workers)
    for batch in straight[:stop]:
        position.advance(batch)
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


def test_damaged_samples_are_dropped_and_counted(tmp_path):
    good = [{"png": image_bytes(i), "txt": b"picture number %d of all" % i} for i in range(8)]
    bad = [
        {"png": b"no image", "txt": b"x"},
        {"png": image_bytes(9)[:60], "txt": b"x"},
        {"png": image_bytes(9), "txt": b"  "},
        {"png": image_bytes(9), "txt": b"\xff\xfe"},
        {"txt": b"x"},
    ]
    write_tar(tmp_path / "a.tar", good[:4] + bad + good[4:])
    batches = take(
        5, config(str(tmp_path / "*.tar"), max_bad_fraction=1.0)
    )  # the fifth reports what two passes dropped
    assert sorted(captions(batches[:2])) == sorted(captions(batches[2:4])) == list(range(8))
    reasons = {reason for batch in batches for reason in batch.dropped}
    assert reasons >= {"no caption", "txt is not UTF-8", "no image"}
    images = {reason for reason in reasons if reason.startswith("undecodable image")}  # PIL has several words for it
    assert reasons == images | {"no caption", "txt is not UTF-8", "no image"}
    assert images


def test_a_torn_shard_does_not_stop_the_others(tmp_path):
    write_pairs(tmp_path, 32, 16)
    torn = tmp_path / "00000.tar"
    torn.write_bytes(torn.read_bytes()[:700])
    batches = take(4, config(str(tmp_path / "*.tar")))
    assert sorted(captions(batches)) == list(range(16, 32))
    assert any("unreadable shard" in reason for batch in batches for reason in batch.dropped)


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
    assert [len(s.urls) for s in parse_train_data(pattern)] == [3]
    assert [len(s.urls) for s in parse_train_data(f"{tmp_path}/a/*.tar")] == [3]
    assert [len(s.urls) for s in parse_train_data("$DATA/a/00000.tar,${DATA}/b/00000.tar")] == [2]
    assert [len(s.urls) for s in parse_train_data("${NONE:-" + str(tmp_path) + "}/a/*.tar")] == [3]
    mixture = parse_train_data(f"{tmp_path}/a/*.tar@0.7::{tmp_path}/b/*.tar@0.3")
    assert [(len(s.urls), s.weight) for s in mixture] == [(3, 0.7), (1, 0.3)]
    assert parse_train_data("pipe:cat {000..002}.tar")[0].urls == tuple(f"pipe:cat 00{i}.tar" for i in range(3))


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
    ],
)
def test_bad_train_data(train_data, message):
    with pytest.raises(UserError, match=message):
        check_shards_exist(parse_train_data(train_data))


def test_empty_shards_are_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match=r"1 of 1 shards are empty files.*0\.tar"):
        check_shards_exist(parse_train_data(str(tmp_path / "0.tar")))


@pytest.mark.parametrize("readers", [1, 3, 5, 7])
def test_readers_share_the_shards(readers, tmp_path):
    pattern = write_pairs(tmp_path, 5, 1)
    (source,) = parse_train_data(pattern)
    dealt = [list(Reader(i, readers).shards(source, seed=0, pass_index=2)) for i in range(readers)]
    if readers <= 5:
        assert sorted(url for shards in dealt for url, _, _ in shards) == sorted(source.urls)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    else:
        assert all({(first, stride) for _, first, stride in shards} == {(i, 7)} for i, shards in enumerate(dealt))


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


@pytest.mark.parametrize("keys", ["", "json", "txt.a", "json.captions:x", "txt:0", "json.a:-1"])
def test_bad_caption_keys(keys):
    with pytest.raises(UserError, match="caption_keys"):
        parse_caption_keys(keys)
