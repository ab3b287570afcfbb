"""The order of samples in one epoch of the data, as arithmetic: who reads which shards, and how a buffer shuffles them.

There are processes x workers *worker slots*. In one *epoch* each sample of a dataset is visited once. A slot's share of
it is a list of shard slices, whose samples *arrive* one after the other and are numbered from 0. The first `size` of
them fill the shuffle buffer; each later one takes the buffer slot drawn for it, whose sample is *emitted*; at the end
the buffer is emptied in a drawn order. The draws depend on a key and the number of the arrival alone, so what a buffer
holds is known without replaying the epoch.

Nothing here opens a shard.
"""

import bisect
import dataclasses
import itertools
import random
import sys
from collections.abc import Sequence

_BLOCK = 4096  # draws from one seed: seeding costs far more than a draw


@dataclasses.dataclass(frozen=True)
class WorkerSlot:
    """One data worker of one process: number `index` of `count` over all processes."""

    index: int
    count: int


@dataclasses.dataclass(frozen=True)
class ShardSlice:
    """Samples of one shard: number `first` and every `stride`-th from there, or exactly the `listed` ones."""

    shard: int  # its number among the dataset's shards, by name
    first: int = 0
    stride: int = 1
    listed: list[int] | None = None  # ascending

    @property
    def numbers(self) -> Sequence[int]:
        """The samples, by their number in the shard; without end unless they are listed."""
        return range(self.first, sys.maxsize, self.stride) if self.listed is None else self.listed

    def __getitem__(self, which: slice) -> "ShardSlice":
        """Return a part of the slice: `[n:]` without its first n samples, `[i::n]` every n-th."""
        numbers = self.numbers[which]
        if isinstance(numbers, range):
            return ShardSlice(self.shard, numbers.start, numbers.step)
        return ShardSlice(self.shard, listed=list(numbers))


def assign(shards: int, slot: WorkerSlot, seed: int, dataset: int, data_epoch: int) -> list[ShardSlice]:
    """Return what `slot` reads in one epoch over the `shards` shards of a dataset, in order.

    Each epoch visits the shards in another seeded order. With at least one shard per slot, whole shards are assigned;
    with fewer, every slot reads all of them and takes each `count`-th sample.
    """
    order = list(range(shards))
    random.Random(f"{seed}/shards/{dataset}/{data_epoch}").shuffle(order)
    return assign_slices([ShardSlice(shard) for shard in order], slot)


def assign_slices(slices: list[ShardSlice], slot: WorkerSlot) -> list[ShardSlice]:
    """Return the share of `slot`: whole slices if there is one for each slot, otherwise a part of every slice."""
    if len(slices) >= slot.count:
        return slices[slot.index :: slot.count]
    return [part[slot.index :: slot.count] for part in slices]


@dataclasses.dataclass(frozen=True)
class BufferState:
    """How many samples of an epoch have arrived, and which of them are still buffered."""

    arrived: int
    buffered: dict[int, int]  # buffer slot -> arrival


class EpochOrder:
    """What the shuffle buffer of one worker slot does in one epoch."""

    def __init__(self, key: str, size: int) -> None:
        """Prepare the draws of `key` for a buffer of `size` samples."""
        self.key, self.size = key, size
        self._block, self._slots = -1, [0]

    def slot(self, arrival: int) -> int:
        """Return the buffer slot that an arrival takes."""
        if arrival < self.size:
            return arrival
        block, place = divmod(arrival, _BLOCK)
        if block != self._block:
            self._slots = random.Random(f"{self.key}/{block}").choices(range(self.size), k=_BLOCK)
            self._block = block
        return self._slots[place]

    def final_slots(self, arrivals: int, emitted: int = 0) -> list[int]:
        """Return the buffer slots still to be emptied at the end of an epoch of `arrivals` samples, in order."""
        slots = list(range(min(arrivals, self.size)))
        random.Random(f"{self.key}/last").shuffle(slots)
        return slots[max(0, emitted - max(0, arrivals - self.size)) :]

    def state(self, emitted: int, arrivals: int | None) -> BufferState:
        """Return the state of the buffer after `emitted` samples.

        With size 3 and the draws 1, 0, 1 for arrivals 3, 4, 5 of six:

            emitted  arrived  buffer slots 0 1 2
            0        0        . . .    nothing is read before the first sample is asked for
            1        4        0 3 2    arrival 3 took slot 1, so 1 was emitted
            2        5        4 3 2    arrival 4 took slot 0, so 0 was emitted
            3        6        4 5 2    arrival 5 took slot 1, so 3 was emitted
            4        6        . 5 2    no more arrivals: the buffer is emptied, here from slot 0

        It is found backwards from the last arrival: a buffer slot holds the latest arrival that took it.

        Args:
            emitted: samples so far.
            arrivals: of the whole epoch, if known. They are known once the buffer is being emptied.
        """
        arrived = emitted + self.size if emitted else 0
        slots: Sequence[int] = range(self.size)
        if arrivals is not None and arrived > arrivals:
            arrived = arrivals
            slots = self.final_slots(arrivals, emitted)
        latest: dict[int, int] = {}
        arrival = arrived
        while len(latest) < min(self.size, arrived):
            arrival -= 1
            latest.setdefault(self.slot(arrival), arrival)
        return BufferState(arrived, {slot: latest[slot] for slot in slots if slot in latest})


def locate(arrivals: Sequence[int], counts: list[int]) -> list[tuple[int, int]]:
    """Return (slice, number in it) of each arrival, where the finished slices had `counts` samples."""
    ends = list(itertools.accumulate(counts))
    slices = [bisect.bisect_right(ends, arrival) for arrival in arrivals]
    return [
        (index, arrival - (ends[index - 1] if index else 0)) for index, arrival in zip(slices, arrivals, strict=True)
    ]


def remaining_slices(slices: list[ShardSlice], counts: list[int], state: BufferState) -> list[ShardSlice]:
    """Return what a slot has not emitted: the buffered samples, the rest of the slice being read, and later slices.

    In the example of `EpochOrder.state` after 2 emitted samples, with `slices` = shards [7, 4, 9] and `counts` = [3]
    (shard 7 is finished, the other arrivals came from shard 4): of the buffered arrivals 4, 3 and 2, one is sample 2 of
    shard 7, two are samples 0 and 1 of shard 4. So what remains is sample 2 of shard 7; samples 0 and 1 of shard 4;
    shard 4 from sample 2 on; shard 9.
    """
    samples: dict[int, list[int]] = {}
    for index, number in locate(list(state.buffered.values()), counts):
        samples.setdefault(index, []).append(slices[index].numbers[number])
    buffered = [ShardSlice(slices[index].shard, listed=sorted(listed)) for index, listed in sorted(samples.items())]
    current = len(counts)
    if current == len(slices):
        return buffered
    return [*buffered, slices[current][state.arrived - sum(counts) :], *slices[current + 1 :]]
