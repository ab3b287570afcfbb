"""Shards to batches: which samples, in which order, with which crops and captions."""

import json
import shutil

import pytest
import torch

from llip.data.position import DataPosition
from tests.data.helpers import captions, config, good, ids, loader, take
from tests.helpers import image_bytes, write_captioned, write_pairs, write_tar


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("per_shard", [4, 48])  # whole shards are assigned; shards are split
def test_one_epoch_visits_every_sample_once(tmp_path, workers, per_shard):
    pattern = write_pairs(tmp_path, 48, per_shard)
    seen = []
    for rank in range(2):
        batches = take(6, config(pattern, workers=workers, batch_size=4), rank, 2)
        assert not any(batch.error for batch in batches)
        seen += captions(batches)
    if workers < 3 or per_shard == 48:  # 12 shards over 6 worker slots is even too
        assert sorted(seen) == list(range(48))
    assert len(set(seen)) == 48


def test_seed_decides_and_each_epoch_reshuffles(tmp_path):
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


def by_sample(batches):
    """id -> (numbers in its captions, mask, image)."""
    numbers = iter(captions(batches))
    found = {}
    for batch in batches:
        for name, mask, image in zip(batch.ids, batch.mask.tolist(), batch.images, strict=True):
            found[name] = ([next(numbers) for _ in mask], mask, image)
    return found


def test_several_captions_are_of_their_image_and_differ_while_it_has_enough(tmp_path):
    pattern = write_captioned(tmp_path, 16, 4)
    settings = config(pattern, caption_keys="json.captions", captions_per_image=3, log_sample_ids=True)
    batches = take(4, settings)
    assert batches[0].tokens.shape == (4, 3, 12)
    for name, (numbers, mask, _) in by_sample(batches).items():
        sample = int(name.split("/")[1][:5]) * 4 + int(name.split("_")[1])
        own = {10 * sample + caption for caption in range(1 + sample % 4)}
        assert set(numbers) <= own
        assert len(set(numbers)) == min(3, len(own)) == sum(mask)
        assert [number not in numbers[:place] for place, number in enumerate(numbers)] == mask


def test_several_captions_depend_neither_on_workers_nor_on_shards_and_change_no_order(tmp_path):
    settings = config(write_captioned(tmp_path, 16, 4), caption_keys="json.captions", captions_per_image=3)
    drawn = by_sample(take(4, settings))
    assert by_sample(take(4, settings.replace(workers=2))).keys() == drawn.keys()
    for changes in ({"workers": 2}, {"shuffle_buffer": 2}, {"captions_per_image": 1}):
        batches = take(4, settings.replace(**changes))
        for name, (numbers, mask, image) in by_sample(batches).items():
            assert numbers == drawn[name][0][: len(numbers)]
            assert mask == drawn[name][1][: len(mask)]
            assert torch.equal(image, drawn[name][2])
    assert ids(take(8, settings)) == ids(take(8, settings.replace(captions_per_image=1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_draws_the_same_captions(tmp_path, workers):
    pattern = write_captioned(tmp_path, 30, 5)
    settings = config(pattern, caption_keys="json.captions", captions_per_image=2, workers=workers)
    straight, position = take(8, settings), DataPosition(workers)
    for batch in straight[:3]:
        position.advance(batch.cursor)
    resumed = take(5, settings, position=position)
    for ours, expected in zip(resumed, straight[3:], strict=True):
        assert torch.equal(ours.tokens, expected.tokens)
        assert torch.equal(ours.mask, expected.mask)


def test_loading_here_leaves_the_random_state_alone(tmp_path):
    batches = iter(loader(config(write_pairs(tmp_path, 8))))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    next(batches)
    assert torch.equal(torch.rand(1), expected)


def test_weighted_mixture_is_drawn_by_weight(tmp_path):
    write_pairs(tmp_path / "a", 8, 8)
    write_tar(tmp_path / "b" / "0.tar", [{"png": image_bytes(i), "txt": b"picture number 99 of all"} for i in range(8)])
    batches = take(100, config(f"{tmp_path}/a/*.tar@0.75::{tmp_path}/b/*.tar@0.25"))
    share = captions(batches).count(99) / 400
    assert 0.18 < share < 0.32


def test_pipe_urls_are_read(tmp_path):
    write_pairs(tmp_path, 4)
    assert sorted(captions(take(1, config(f"pipe:cat {tmp_path}/00000.tar")))) == [0, 1, 2, 3]


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


@pytest.mark.slow
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
