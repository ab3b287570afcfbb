"""The arithmetic of one pass, against a buffer that is really filled and emptied."""

import itertools

import pytest

from llip.data.order import PassOrder, Piece, Reader, Standing, deal, deal_pieces, left_over, locate


def play(order, arrivals):
    """Send numbered samples through a buffer; yield (emitted sample, what the buffer holds after it)."""
    slots = {}
    for arrival in range(arrivals):
        slot = order.slot(arrival)
        if arrival < order.size:
            slots[slot] = arrival
        else:
            out, slots[slot] = slots[slot], arrival
            yield out, dict(slots)
    for slot in order.last(arrivals):
        yield slots.pop(slot), dict(slots)


@pytest.mark.parametrize(("size", "arrivals"), [(1, 9), (5, 3), (5, 5), (7, 60), (64, 9000)])
def test_what_a_buffer_holds_is_known_without_replaying(size, arrivals):
    order = PassOrder("key", size)
    played = list(play(order, arrivals))
    assert sorted(sample for sample, _ in played) == list(range(arrivals))
    other = PassOrder("key", size)  # asked in another order, from nothing
    for emitted in range(arrivals, 0, -max(1, arrivals // 50)):
        arrived = emitted + size
        known = arrivals if arrived > arrivals else None
        assert other.standing(emitted, known) == Standing(min(arrived, arrivals), played[emitted - 1][1])
    assert other.standing(0, None) == Standing(0, {})


def test_a_buffer_mixes_and_the_key_decides():
    emitted = [[sample for sample, _ in play(PassOrder(key, 50), 500)] for key in ("a", "a", "b")]
    assert emitted[0] == emitted[1] != emitted[2]
    assert emitted[0] != sorted(emitted[0])
    late = [place - sample for place, sample in enumerate(emitted[0][:450])]
    assert min(late) >= -50 and max(late) > 50  # noqa: PT018 - never before it has arrived; some stay for long


@pytest.mark.parametrize("readers", [1, 3, 5, 7])
def test_readers_share_the_shards(readers):
    dealt = [deal(5, Reader(index, readers), seed=0, dataset=0, pass_index=2) for index in range(readers)]
    samples = [
        [(piece.shard, sample) for piece in pieces for sample in range(piece.first, 100, piece.stride)]
        for pieces in dealt
    ]
    assert sorted(itertools.chain(*samples)) == [(shard, sample) for shard in range(5) for sample in range(100)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_each_pass_and_dataset_has_an_order_of_its_own():
    orders = [deal(30, Reader(0, 1), *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_pieces_count_their_samples():
    split, listed = Piece(3, 2, 4), Piece(3, listed=[1, 5, 6, 9])
    assert [split.sample(i) for i in range(3)] == [2, 6, 10]
    assert split.rest(2).sample(0) == 10
    assert [split.split(1, 2).sample(i) for i in range(2)] == [6, 14]
    assert listed.sample(2) == 6
    assert listed.rest(1).listed == [5, 6, 9]
    assert listed.split(1, 3).listed == [5]


def test_locate_passes_over_empty_pieces():
    assert locate([0, 2, 3, 4], [3, 0, 1]) == [(0, 0), (0, 2), (2, 0), (3, 0)]


@pytest.mark.parametrize("emitted", [0, 1, 5, 12, 20, 29, 36, 40])
def test_what_is_left_over_is_what_was_not_emitted(emitted):
    """Pieces of 10, 0 and 30 samples: the last one every second of a shard."""
    pieces, lengths, order = [Piece(4), Piece(2), Piece(7, 1, 2)], [10, 0, 30], PassOrder("x", 6)
    every = [
        (piece.shard, piece.sample(i)) for piece, length in zip(pieces, lengths, strict=True) for i in range(length)
    ]
    gone = {every[sample] for sample, _ in itertools.islice(play(order, 40), emitted)}
    arrived = min(emitted + 6, 40) if emitted else 0
    counts = lengths if emitted + 6 > 40 else lengths[:2] if arrived > 10 else lengths[:1] if arrived == 10 else []
    left = left_over(pieces, counts, order.standing(emitted, 40 if len(counts) == 3 else None))
    found = []
    for piece in left:
        length = 10 if piece.shard == 4 else 0 if piece.shard == 2 else 61
        numbers = range(piece.first, length, piece.stride) if piece.listed is None else piece.listed
        found += [(piece.shard, number) for number in numbers]
    assert sorted(found) == sorted(set(every) - gone)
    shares = [deal_pieces(left, Reader(index, 2)) for index in range(2)]
    assert sum(map(len, shares)) in (len(left), 2 * len(left))
