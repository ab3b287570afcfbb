"""The order of samples in one pass, as arithmetic: who reads which shards, and what the shuffle buffer does with them.

A *reader* is one data worker of one training process; there are processes x workers of them. A *pass* is one visit to
every sample of a dataset. A reader's share of a pass is a list of pieces; their samples *arrive* one after the other
and are numbered from 0. The first `size` of them fill the buffer's slots; each later one takes the slot that is drawn
for it, whose sample is *emitted*; at the end the slots that are left are emitted in a drawn order. The draws depend on
a key and the number of the arrival alone, so what a buffer holds is known without replaying the pass.

Nothing here opens a shard.
"""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Sequence

_BLOCK = 4096  # slots drawn at once: an integer seed for each would take longer than its sample's place in the buffer


@dataclasses.dataclass(frozen=True)
class Reader:
    """Which share of the data one data worker reads: number `index` of `count`."""

    index: int
    count: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Samples of one shard: number `first` and every `stride`-th from there, or exactly the `listed` ones."""

    shard: int  # its number among the dataset's shards, by name
    first: int = 0
    stride: int = 1
    listed: list[int] | None = None  # ascending

    def sample(self, number: int) -> int:
        """Return which sample of the shard is this piece's `number`-th."""
        return self.first + self.stride * number if self.listed is None else self.listed[number]

    def rest(self, number: int) -> "Piece":
        """Return the piece without its first `number` samples."""
        if self.listed is None:
            return Piece(self.shard, self.first + self.stride * number, self.stride)
        return Piece(self.shard, listed=self.listed[number:])

    def split(self, index: int, count: int) -> "Piece":
        """Return part `index` of `count` of the piece."""
        if self.listed is None:
            return Piece(self.shard, self.first + self.stride * index, self.stride * count)
        return Piece(self.shard, listed=self.listed[index::count])


def deal(shards: int, reader: Reader, seed: int, dataset: int, pass_index: int) -> list[Piece]:
    """Return what `reader` reads in one pass over `shards` shards of the dataset number `dataset`, in order.

    Each pass visits the shards in another seeded order. With at least one shard per reader whole shards are dealt out;
    with fewer, every reader goes through all of them and takes each `count`-th sample.
    """
    order = list(range(shards))
    random.Random(f"{seed}/shards/{dataset}/{pass_index}").shuffle(order)
    return deal_pieces([Piece(shard) for shard in order], reader)


def deal_pieces(pieces: list[Piece], reader: Reader) -> list[Piece]:
    """Return the share of `reader` in `pieces`: each goes to one reader, or a part of each to every reader."""
    if len(pieces) >= reader.count:
        return pieces[reader.index :: reader.count]
    return [piece.split(reader.index, reader.count) for piece in pieces]


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a pass stands: what has arrived, and what of it has not been emitted."""

    arrived: int
    held: dict[int, int]  # slot -> arrival


class PassOrder:
    """What the shuffle buffer of one reader does in one pass."""

    def __init__(self, key: str, size: int) -> None:
        """Prepare the draws of `key` for a buffer of `size` samples."""
        self.key, self.size = key, size
        self._block, self._slots = -1, [0]

    def slot(self, arrival: int) -> int:
        """Return the slot that an arrival takes."""
        if arrival < self.size:
            return arrival
        block, place = divmod(arrival, _BLOCK)
        if block != self._block:
            self._slots = random.Random(f"{self.key}/{block}").choices(range(self.size), k=_BLOCK)
            self._block = block
        return self._slots[place]

    def last(self, arrivals: int) -> list[int]:
        """Return the slots that are emitted at the end of a pass of `arrivals` samples, in order."""
        slots = list(range(min(arrivals, self.size)))
        random.Random(f"{self.key}/last").shuffle(slots)
        return slots

    def standing(self, emitted: int, arrivals: int | None) -> Standing:
        """Return where the pass stands after `emitted` samples.

        Args:
            emitted: samples.
            arrivals: of the whole pass, where they are known. They are as soon as the last slots are emitted.
        """
        arrived = emitted + self.size if emitted else 0
        slots = range(self.size)
        if arrivals is not None and arrived > arrivals:
            arrived = arrivals
            slots = self.last(arrivals)[emitted - max(0, arrivals - self.size) :]
        held: dict[int, int] = {}
        arrival = arrived
        while len(held) < min(self.size, arrived):  # an arrival holds its slot until the next one that takes it
            arrival -= 1
            held.setdefault(self.slot(arrival), arrival)
        return Standing(arrived, {slot: held[slot] for slot in slots if slot in held})


def locate(arrivals: Sequence[int], counts: list[int]) -> list[tuple[int, int]]:
    """Return (piece, number in it) of each arrival, where the first pieces gave `counts` samples."""
    ends = list(itertools.accumulate(counts))
    pieces = [bisect.bisect_right(ends, arrival) for arrival in arrivals]
    return [
        (piece, arrival - (ends[piece - 1] if piece else 0)) for piece, arrival in zip(pieces, arrivals, strict=True)
    ]


def left_over(pieces: list[Piece], counts: list[int], standing: Standing) -> list[Piece]:
    """Return what of a reader's share has not been emitted: from the buffer, of the piece being read, and the rest."""
    listed: dict[int, list[int]] = {}
    for piece, number in locate(list(standing.held.values()), counts):
        listed.setdefault(piece, []).append(pieces[piece].sample(number))
    held = [Piece(pieces[piece].shard, listed=sorted(samples)) for piece, samples in sorted(listed.items())]
    current = len(counts)
    if current == len(pieces):
        return held
    return [*held, pieces[current].rest(standing.arrived - sum(counts)), *pieces[current + 1 :]]
