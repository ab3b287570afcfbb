"""The arithmetic of one epoch, against a buffer that is really filled and emptied."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llip.data.order import (
    BufferState,
    EpochOrder,
    ShardSlice,
    WorkerSlot,
    assign,
    assign_slices,
    locate,
    remaining_slices,
)


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
    for slot in order.final_slots(arrivals):
        yield slots.pop(slot), dict(slots)


@pytest.mark.parametrize(("size", "arrivals"), [(1, 9), (5, 3), (5, 5), (7, 60), (64, 9000)])
def test_what_a_buffer_holds_is_known_without_replaying(size, arrivals):
    order = EpochOrder("key", size)
    played = list(play(order, arrivals))
    assert sorted(sample for sample, _ in played) == list(range(arrivals))
    other = EpochOrder("key", size)  # asked in another order, from nothing
    for emitted in range(arrivals, 0, -max(1, arrivals // 50)):
        arrived = emitted + size
        known = arrivals if arrived > arrivals else None
        assert other.state(emitted, known) == BufferState(min(arrived, arrivals), played[emitted - 1][1])
    assert other.state(0, None) == BufferState(0, {})


def test_a_buffer_mixes_and_the_key_decides():
    emitted = [[sample for sample, _ in play(EpochOrder(key, 50), 500)] for key in ("a", "a", "b")]
    assert emitted[0] == emitted[1] != emitted[2]
    assert emitted[0] != sorted(emitted[0])
    late = [place - sample for place, sample in enumerate(emitted[0][:450])]
    assert min(late) >= -50 and max(late) > 50  # noqa: PT018 - never before it has arrived; some stay for long


@pytest.mark.parametrize("slots", [1, 3, 5, 7])
def test_slots_share_the_shards(slots):
    shares = [assign(5, WorkerSlot(index, slots), seed=0, dataset=0, data_epoch=2) for index in range(slots)]
    samples = [
        [(part.shard, sample) for part in slices for sample in range(part.first, 100, part.stride)] for slices in shares
    ]
    assert sorted(itertools.chain(*samples)) == [(shard, sample) for shard in range(5) for sample in range(100)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_epoch_and_dataset_has_its_own_order():
    orders = [assign(30, WorkerSlot(0, 1), *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_slices_count_their_samples():
    split, listed = ShardSlice(3, 2, 4), ShardSlice(3, listed=[1, 5, 6, 9])
    assert [split.numbers[i] for i in range(3)] == [2, 6, 10]
    assert split[2:].numbers[0] == 10
    assert [split[1::2].numbers[i] for i in range(2)] == [6, 14]
    assert listed.numbers[2] == 6
    assert listed[1:].listed == [5, 6, 9]
    assert listed[1::3].listed == [5]


def test_locate_skips_empty_slices():
    assert locate([0, 2, 3, 4], [3, 0, 1]) == [(0, 0), (0, 2), (2, 0), (3, 0)]


@pytest.mark.parametrize("emitted", [0, 1, 5, 12, 20, 29, 36, 40])
def test_what_is_left_over_is_what_was_not_emitted(emitted):
    """Pieces of 10, 0 and 30 samples: the last one every second of a shard."""
    slices, lengths, order = [ShardSlice(4), ShardSlice(2), ShardSlice(7, 1, 2)], [10, 0, 30], EpochOrder("x", 6)
    every = [(part.shard, part.numbers[i]) for part, length in zip(slices, lengths, strict=True) for i in range(length)]
    gone = {every[sample] for sample, _ in itertools.islice(play(order, 40), emitted)}
    arrived = min(emitted + 6, 40) if emitted else 0
    counts = lengths if emitted + 6 > 40 else lengths[:2] if arrived > 10 else lengths[:1] if arrived == 10 else []
    left = remaining_slices(slices, counts, order.state(emitted, 40 if len(counts) == 3 else None))
    remaining = []
    for part in left:
        length = 10 if part.shard == 4 else 0 if part.shard == 2 else 61
        numbers = range(part.first, length, part.stride) if part.listed is None else part.listed
        remaining += [(part.shard, number) for number in numbers]
    assert sorted(remaining) == sorted(set(every) - gone)
    shares = [assign_slices(left, WorkerSlot(index, 2)) for index in range(2)]
    assert sum(map(len, shares)) in (len(left), 2 * len(left))


def test_the_worked_example_of_the_docstrings(monkeypatch):
    order = EpochOrder("example", 3)
    monkeypatch.setattr(order, "slot", lambda arrival: [0, 1, 2, 1, 0, 1][arrival])
    states = [order.state(emitted, 6 if emitted > 3 else None) for emitted in range(4)]
    assert [state.arrived for state in states] == [0, 4, 5, 6]
    assert [dict(sorted(state.buffered.items())) for state in states] == [
        {},
        {0: 0, 1: 3, 2: 2},
        {0: 4, 1: 3, 2: 2},
        {0: 4, 1: 5, 2: 2},
    ]
    (first,) = order.final_slots(6)[:1]  # the docstring empties slot 0 first
    assert order.state(4, 6).buffered == {slot: states[3].buffered[slot] for slot in order.final_slots(6)[1:]}
    assert first not in order.state(4, 6).buffered
    slices = [ShardSlice(7), ShardSlice(4), ShardSlice(9)]
    assert remaining_slices(slices, [3], states[2]) == [
        ShardSlice(7, listed=[2]),
        ShardSlice(4, listed=[0, 1]),
        ShardSlice(4, first=2),
        ShardSlice(9),
    ]


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=6)  # samples per shard
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True)


def samples_of(part, lengths):
    """The (shard, sample) pairs of a slice."""
    numbers = range(part.first, lengths[part.shard], part.stride) if part.listed is None else part.listed
    return [(part.shard, number) for number in numbers]


def stop(order, slices, lengths, emitted):
    """Stop a slot after `emitted` samples: (what it emitted, the slices that remain)."""
    arrivals = [sample for part in slices for sample in samples_of(part, lengths)]
    gone = [arrivals[arrival] for arrival, _ in itertools.islice(play(order, len(arrivals)), emitted)]
    arrived = emitted + order.size if emitted else 0
    ends = list(itertools.accumulate(len(samples_of(part, lengths)) for part in slices))
    finished = len(slices) if arrived > len(arrivals) else sum(end <= arrived for end in ends) if emitted else 0
    counts = [len(samples_of(part, lengths)) for part in slices[:finished]]
    state = order.state(emitted, len(arrivals) if finished == len(slices) else None)
    return gone, remaining_slices(slices, counts, state)


@BOUNDED
@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.data())
def test_resuming_and_resharding_at_any_point_repeats_and_loses_nothing(lengths, before, after, size, data):
    emitted, remaining = [], []
    for index in range(before):
        slices = assign(len(lengths), WorkerSlot(index, before), seed=1, dataset=0, data_epoch=0)
        total = sum(len(samples_of(part, lengths)) for part in slices)
        gone, rest = stop(EpochOrder(f"{index}", size), slices, lengths, data.draw(st.integers(0, total)))
        emitted += gone
        remaining += rest
    for index in range(after):
        for part in assign_slices(remaining, WorkerSlot(index, after)):
            emitted += samples_of(part, lengths)
    assert sorted(emitted) == [(shard, number) for shard, length in enumerate(lengths) for number in range(length)]
