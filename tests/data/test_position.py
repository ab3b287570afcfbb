"""Where the data resume after a restart: at the same place, resharded, or with other shards."""

import copy

import pytest

from llip.data.order import ShardSlice
from llip.data.position import (
    Cursor,
    DataPosition,
    Layout,
    Move,
    StreamPosition,
    continue_data,
    reshard,
    shards_digest,
)

LAYOUT = Layout(seed=3, shuffle_buffer=2, shards=[4])


def position(workers, *moves, shards=(11,)):
    """A position after batches that ended at `moves` of the only dataset."""
    made = DataPosition(workers, shards=list(shards))
    for drawn, move in enumerate(moves, start=1):
        made.advance(Cursor(drawn, [move]))
    return made


def test_batches_advance_the_slots_in_turn():
    made = position(2, Move(0, 3, [5]), Move(0, 4, []), Move(0, 6, [7]), Move(1, 2, []), Move(1, 1, [9]))
    first, second = (slot.streams[0] for slot in made.slots)
    assert first == StreamPosition(1, 1, [9])  # a new epoch begins its counts after
    assert second == StreamPosition(1, 2, [])
    assert made.batches == 5
    assert [slot.drawn for slot in made.slots] == [5, 4]


def test_shares_of_passes_that_are_over_are_forgotten():
    stream = StreamPosition(2, 1, [], {2: [ShardSlice(0)], 3: [ShardSlice(1)]})
    stream.move(Move(3, 1, []))
    assert list(stream.shares) == [3]


def test_the_same_topology_goes_on_where_it_was():
    old = [position(2, Move(0, 3, [5])), position(2, Move(0, 4, [6]))]
    new, note = continue_data(copy.deepcopy(old), position(2), LAYOUT, 1, 2)
    assert (new, note) == (old[1], None)
    alone = position(0, Move(0, 3, [5]))
    new, note = continue_data([alone], position(1), LAYOUT, 0, 1)  # no workers are one slot too
    assert (new.slots, new.workers, note) == (alone.slots, 1, None)


def test_nothing_used_is_the_start():
    fresh = position(3)
    assert continue_data([position(1), position(1)], fresh, LAYOUT, 0, 1) == (fresh, None)


def test_other_shards_begin_a_new_epoch():
    new, note = continue_data([position(1, Move(4, 3, [5]))], position(2, shards=(12,)), LAYOUT, 0, 1)
    assert [slot.streams[0].data_epoch for slot in new.slots] == [5, 5]
    assert "train_data names other shards" in note
    assert shards_digest(["a", "b"]) != shards_digest(["b", "a"])


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 1), (1, 3)])
def test_what_remains_is_assigned_once(processes, workers):
    """One slot of four shards of 5 samples has emitted 6, so that 8 have come: 5 of its first shard, 3 of another."""
    old = [position(1, Move(0, 6, [5]))]
    after = reshard(old, LAYOUT, processes, workers)
    assert [len(one.slots) for one in after] == [workers] * processes
    slices = [part for one in after for slot in one.slots for part in slot.streams[0].shares[0]]
    samples = [
        (part.shard, sample)
        for part in slices
        for sample in (range(part.first, 5, part.stride) if part.listed is None else part.listed)
    ]
    assert len(samples) == len(set(samples)) == 20 - 6
    again = [DataPosition.from_plain(one.plain()) for one in after]
    assert again == after
    _, note = continue_data(old, position(workers), LAYOUT, 0, processes)
    assert (note is None) == ((processes, workers) == (1, 1))
