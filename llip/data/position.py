"""Where the data stand, in plain numbers for checkpoints, and how they are dealt anew to other readers.

A reader remembers, for each dataset, its pass, how many samples it has emitted in it, and how many each piece of its
share gave that it has read to the end. With the arithmetic of `order` that says exactly which samples are still to
come, whatever has happened to the shards since.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from llip.data.order import PassOrder, Piece, Reader, deal, deal_pieces, left_over


class Move(NamedTuple):
    """Where a reader stands in a dataset after a batch."""

    pass_index: int
    emitted: int
    counts: list[int]  # of the pieces that it has finished since its last batch, or since the pass began


class Cursor(NamedTuple):
    """Where a reader stands after a batch."""

    drawn: int  # raw samples, of all datasets
    moves: list[Move]  # per dataset


@dataclasses.dataclass
class StreamPosition:
    """Where one reader stands in one dataset."""

    pass_index: int = 0
    emitted: int = 0  # raw samples in this pass, usable or not
    counts: list[int] = dataclasses.field(default_factory=list)  # samples of the pieces that it has read to the end
    shares: dict[int, list[Piece]] = dataclasses.field(default_factory=dict)  # pass -> what was dealt anew to it

    def move(self, move: Move) -> None:
        """Go on to where a batch ended."""
        if move.pass_index != self.pass_index:
            self.counts = []
            self.shares = {number: share for number, share in self.shares.items() if number >= move.pass_index}
        self.pass_index, self.emitted = move.pass_index, move.emitted
        self.counts = [*self.counts, *move.counts] if move.counts else self.counts


@dataclasses.dataclass
class ReaderPosition:
    """Where one reader stands."""

    drawn: int = 0  # raw samples, of all datasets
    streams: list[StreamPosition] = dataclasses.field(default_factory=list)  # per dataset


class Layout(NamedTuple):
    """What decides the order of samples, beside the readers."""

    seed: int
    shuffle_buffer: int
    shards: list[int]  # per dataset, how many

    def share(self, reader: Reader, dataset: int, pass_index: int, position: StreamPosition) -> list[Piece]:
        """Return what `reader` reads in one pass over a dataset."""
        if pass_index in position.shares:
            return position.shares[pass_index]
        return deal(self.shards[dataset], reader, self.seed, dataset, pass_index)

    def order(self, reader: Reader, dataset: int, pass_index: int) -> PassOrder:
        """Return what the reader's buffer does in one pass over a dataset."""
        return PassOrder(f"{self.seed}/buffer/{dataset}/{pass_index}/{reader.index}", self.shuffle_buffer)


@dataclasses.dataclass
class DataPosition:
    """Where one process stands in its stream of batches: plain numbers, stored in checkpoints."""

    workers: int
    batches: int = 0
    readers: list[ReaderPosition] = dataclasses.field(default_factory=list)  # per logical worker; empty: at the start
    shards: list[int] = dataclasses.field(default_factory=list)  # a digest of the shards' names, per dataset

    def advance(self, cursor: Cursor) -> None:
        """Note that the trainer has used a batch that ended at `cursor`: batches come from the workers in turn."""
        if not self.readers:
            self.readers = [
                ReaderPosition(0, [StreamPosition() for _ in cursor.moves]) for _ in range(max(1, self.workers))
            ]
        reader = self.readers[self.batches % max(1, self.workers)]
        reader.drawn = cursor.drawn
        for stream, move in zip(reader.streams, cursor.moves, strict=True):
            stream.move(move)
        self.batches += 1

    def plain(self) -> dict[str, Any]:
        """Return plain containers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, saved: dict[str, Any]) -> "DataPosition":
        """Return what `plain` describes."""
        readers = [
            ReaderPosition(
                reader["drawn"],
                [
                    StreamPosition(**stream | {"shares": {k: [Piece(**p) for p in v] for k, v in shares.items()}})
                    for stream in reader["streams"]
                    for shares in [stream["shares"]]
                ],
            )
            for reader in saved["readers"]
        ]
        return cls(saved["workers"], saved["batches"], readers, list(saved["shards"]))


def shards_digest(names: Iterable[str]) -> int:
    """Return a number that stands for the names of a dataset's shards, in order."""
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))


def deal_anew(old: list[DataPosition], layout: Layout, processes: int, workers: int) -> list[DataPosition]:
    """Return where `processes` x `workers` readers go on, so that together they read exactly what `old` had left.

    What is left of each pass that somebody is in is dealt out; the passes after it are dealt as ever.

    Args:
        old: the positions of all processes, by rank, of one number of workers and the shards of `layout`.
        layout: of the data.
        processes: from now on.
        workers: per process from now on, 0 for none.
    """
    before = [reader for position in old for reader in position.readers]
    readers = [Reader(index, processes * max(1, workers)) for index in range(processes * max(1, workers))]
    anew = [ReaderPosition(sum(reader.drawn for reader in before) // len(readers)) for _ in readers]
    for dataset in range(len(layout.shards)):
        streams = [reader.streams[dataset] for reader in before]
        left = _left_over(streams, layout, dataset)
        for reader, position in zip(readers, anew, strict=True):
            shares = {pass_index: deal_pieces(pieces, reader) for pass_index, pieces in left.items()}
            position.streams.append(StreamPosition(min(left, default=0), shares=shares))
    per_process = max(1, workers)
    return [
        DataPosition(workers, 0, anew[rank * per_process : (rank + 1) * per_process], list(old[0].shards))
        for rank in range(processes)
    ]


def _left_over(streams: list[StreamPosition], layout: Layout, dataset: int) -> dict[int, list[Piece]]:
    """Return what the readers at `streams` have left of each pass over a dataset that one of them has begun."""
    left: dict[int, list[Piece]] = {}
    passes = [number for stream in streams for number in (stream.pass_index, *stream.shares)]
    for pass_index in range(min((stream.pass_index for stream in streams), default=0), max(passes, default=-1) + 1):
        left[pass_index] = []
        for index, stream in enumerate(streams):
            if stream.pass_index > pass_index:
                continue
            reader = Reader(index, len(streams))
            pieces = layout.share(reader, dataset, pass_index, stream)
            if stream.pass_index == pass_index and stream.emitted:
                arrivals = sum(stream.counts) if len(stream.counts) == len(pieces) else None
                standing = layout.order(reader, dataset, pass_index).standing(stream.emitted, arrivals)
                pieces = left_over(pieces, stream.counts, standing)
            left[pass_index] += pieces
    return left


def continue_data(
    old: list[DataPosition], new: DataPosition, layout: Layout, rank: int, processes: int
) -> tuple[DataPosition, str | None]:
    """Return where process `rank` of `processes` goes on, and a sentence about it unless that is exactly where it was.

    Args:
        old: the positions of all processes of the run before.
        new: the position of this process at the start, with its number of workers and its shards.
        layout: of the data.
        rank: of this process.
        processes: now.
    """
    if not any(position.readers for position in old):
        return new, None
    before, after = max(1, old[0].workers), max(1, new.workers)
    if old[0].shards != new.shards:
        last = max(stream.pass_index for one in old for reader in one.readers for stream in reader.streams)
        new.readers = [ReaderPosition(0, [StreamPosition(last + 1) for _ in layout.shards]) for _ in range(after)]
        return new, "the data begin a new pass, because train_data names other shards than before the restart"
    if (len(old), before) == (processes, after):
        return dataclasses.replace(old[rank], workers=new.workers), None
    drawn = sum(reader.drawn for position in old for reader in position.readers)
    return deal_anew(old, layout, processes, new.workers)[rank], (
        f"the data go on {drawn:,} samples into the stream, and what is left of the pass is dealt anew to {processes} "
        f"processes x {after} workers (before: {len(old)} x {before}): 0 samples repeated, 0 left out"
    )
