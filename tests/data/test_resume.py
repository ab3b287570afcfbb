"""What a loader yields after a restart, with the same processes and workers or others."""

import copy
import json
from collections import Counter

import pytest
import torch

from llip.data.position import DataPosition, Layout, reshard
from tests.data.helpers import captions, config, dropped, good, ids, take
from tests.helpers import write_pairs, write_tar


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


@pytest.mark.slow
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
    assert set(counts) == set(range(90))  # the first epoch is over, each sample came
    assert max(counts.values()) <= 2  # and none came twice before it was


def int_keys(record):
    return {int(key) if key.isdecimal() else key: value for key, value in record.items()}


def test_a_restart_reads_again_only_what_it_needs(tmp_path):
    """Shards that are finished are neither opened nor missed, except those that the buffer still holds samples of."""
    pattern = write_pairs(tmp_path, 120, 4)
    settings = config(pattern, shuffle_buffer=2)
    straight = take(30, settings)
    position = DataPosition(0)
    for batch in straight[:24]:
        position.advance(batch.cursor)
    buffered = set(captions(straight[24:]))
    for number in range(30):
        if buffered.isdisjoint(range(4 * number, 4 * number + 4)):
            (tmp_path / f"{number:05d}.tar").unlink()
    resumed = take(6, settings, position=position)
    assert captions(resumed) == captions(straight[24:])
    assert not dropped(resumed)


def test_a_restart_says_when_a_buffered_sample_is_gone(tmp_path):
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
