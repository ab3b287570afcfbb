"""Where the data go on after a restart: at the same place, dealt anew, or with other shards."""

import copy

import pytest

from llip.data.order import Piece
from llip.data.position import (
    Cursor,
    DataPosition,
    Layout,
    Move,
    StreamPosition,
    continue_data,
    deal_anew,
    shards_digest,
)

LAYOUT = Layout(seed=3, shuffle_buffer=2, shards=[4])


def position(workers, *moves, shards=(11,)):
    """A position after batches that ended at `moves` of the only dataset."""
    made = DataPosition(workers, shards=list(shards))
    for drawn, move in enumerate(moves, start=1):
        made.advance(Cursor(drawn, [move]))
    return made


def test_batches_advance_the_readers_in_turn():
    made = position(2, Move(0, 3, [5]), Move(0, 4, []), Move(0, 6, [7]), Move(1, 2, []), Move(1, 1, [9]))
    first, second = (reader.streams[0] for reader in made.readers)
    assert first == StreamPosition(1, 1, [9])  # a new pass begins its counts anew
    assert second == StreamPosition(1, 2, [])
    assert made.batches == 5
    assert [reader.drawn for reader in made.readers] == [5, 4]


def test_shares_of_passes_that_are_over_are_forgotten():
    stream = StreamPosition(2, 1, [], {2: [Piece(0)], 3: [Piece(1)]})
    stream.move(Move(3, 1, []))
    assert list(stream.shares) == [3]


def test_the_same_topology_goes_on_where_it_was():
    old = [position(2, Move(0, 3, [5])), position(2, Move(0, 4, [6]))]
    found, note = continue_data(copy.deepcopy(old), position(2), LAYOUT, 1, 2)
    assert (found, note) == (old[1], None)
    alone = position(0, Move(0, 3, [5]))
    found, note = continue_data([alone], position(1), LAYOUT, 0, 1)  # no workers are one reader too
    assert (found.readers, found.workers, note) == (alone.readers, 1, None)


def test_nothing_used_is_the_start():
    fresh = position(3)
    assert continue_data([position(1), position(1)], fresh, LAYOUT, 0, 1) == (fresh, None)


def test_other_shards_begin_a_new_pass():
    found, note = continue_data([position(1, Move(4, 3, [5]))], position(2, shards=(12,)), LAYOUT, 0, 1)
    assert [reader.streams[0].pass_index for reader in found.readers] == [5, 5]
    assert "train_data names other shards" in note
    assert shards_digest(["a", "b"]) != shards_digest(["b", "a"])


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 1), (1, 3)])
def test_what_is_left_is_dealt_once(processes, workers):
    """One reader of four shards of 5 samples has emitted 6, so that 8 have come: 5 of its first shard, 3 of another."""
    old = [position(1, Move(0, 6, [5]))]
    anew = deal_anew(old, LAYOUT, processes, workers)
    assert [len(one.readers) for one in anew] == [workers] * processes
    pieces = [piece for one in anew for reader in one.readers for piece in reader.streams[0].shares[0]]
    samples = [
        (piece.shard, sample)
        for piece in pieces
        for sample in (range(piece.first, 5, piece.stride) if piece.listed is None else piece.listed)
    ]
    assert len(samples) == len(set(samples)) == 20 - 6
    again = [DataPosition.from_plain(one.plain()) for one in anew]
    assert again == anew
    _, note = continue_data(old, position(workers), LAYOUT, 0, processes)
    assert (note is None) == ((processes, workers) == (1, 1))
