"""The position in the data, in plain numbers for checkpoints, and how it is resharded for other processes or workers.

A worker slot remembers, for each dataset, its epoch, the samples it has emitted in it, and the sample counts of the
shard slices it has finished. With the arithmetic of `order` these determine which samples are still to come, whatever
has happened to the shards since.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from llip.data.order import EpochOrder, ShardSlice, WorkerSlot, assign, assign_slices, remaining_slices


class Move(NamedTuple):
    """The position of a worker slot in a dataset after a batch."""

    data_epoch: int
    emitted: int
    counts: list[int]  # of the slices finished since its last batch, or since the epoch began


class Cursor(NamedTuple):
    """The position of a worker slot after a batch."""

    drawn: int  # raw samples, of all datasets
    moves: list[Move]  # per dataset


@dataclasses.dataclass
class StreamPosition:
    """The position of one worker slot in one dataset."""

    data_epoch: int = 0
    emitted: int = 0  # raw samples in this epoch, usable or not
    counts: list[int] = dataclasses.field(default_factory=list)  # samples of the slices that are finished
    shares: dict[int, list[ShardSlice]] = dataclasses.field(default_factory=dict)  # data epoch -> resharded slices

    def move(self, move: Move) -> None:
        """Advance to the end of a batch."""
        if move.data_epoch != self.data_epoch:
            self.counts = []
            self.shares = {epoch: share for epoch, share in self.shares.items() if epoch >= move.data_epoch}
        self.data_epoch, self.emitted = move.data_epoch, move.emitted
        self.counts = [*self.counts, *move.counts] if move.counts else self.counts


@dataclasses.dataclass
class SlotPosition:
    """The position of one worker slot."""

    drawn: int = 0  # raw samples, of all datasets
    streams: list[StreamPosition] = dataclasses.field(default_factory=list)  # per dataset


class Layout(NamedTuple):
    """What determines the order of samples, beside the worker slots."""

    seed: int
    shuffle_buffer: int
    shards: list[int]  # per dataset, how many

    def share(self, slot: WorkerSlot, dataset: int, data_epoch: int, position: StreamPosition) -> list[ShardSlice]:
        """Return what `slot` reads in one epoch of a dataset."""
        if data_epoch in position.shares:
            return position.shares[data_epoch]
        return assign(self.shards[dataset], slot, self.seed, dataset, data_epoch)

    def order(self, slot: WorkerSlot, dataset: int, data_epoch: int) -> EpochOrder:
        """Return what the slot's shuffle buffer does in one epoch of a dataset."""
        return EpochOrder(f"{self.seed}/buffer/{dataset}/{data_epoch}/{slot.index}", self.shuffle_buffer)


@dataclasses.dataclass
class DataPosition:
    """The position of one process in its stream of batches: plain numbers, stored in checkpoints."""

    workers: int
    batches: int = 0
    slots: list[SlotPosition] = dataclasses.field(default_factory=list)  # per logical worker; empty at the start
    shards: list[int] = dataclasses.field(default_factory=list)  # a digest of the shards' names, per dataset

    def advance(self, cursor: Cursor) -> None:
        """Count a batch that ended at `cursor` as used: batches come from the workers in turn."""
        if not self.slots:
            self.slots = [
                SlotPosition(0, [StreamPosition() for _ in cursor.moves]) for _ in range(max(1, self.workers))
            ]
        slot = self.slots[self.batches % max(1, self.workers)]
        slot.drawn = cursor.drawn
        for stream, move in zip(slot.streams, cursor.moves, strict=True):
            stream.move(move)
        self.batches += 1

    def plain(self) -> dict[str, Any]:
        """Return plain containers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, saved: dict[str, Any]) -> "DataPosition":
        """Return what `plain` describes; `readers` and `pass_index` are what 0.1 called `slots` and `data_epoch`."""
        slots = [
            SlotPosition(slot["drawn"], [_stream_from_plain(stream) for stream in slot["streams"]])
            for slot in (saved["slots"] if "slots" in saved else saved["readers"])
        ]
        return cls(saved["workers"], saved["batches"], slots, list(saved["shards"]))


def _stream_from_plain(saved: dict[str, Any]) -> StreamPosition:
    shares = {epoch: [ShardSlice(**part) for part in share] for epoch, share in saved["shares"].items()}
    data_epoch = saved["data_epoch"] if "data_epoch" in saved else saved["pass_index"]
    return StreamPosition(data_epoch, saved["emitted"], saved["counts"], shares)


def shards_digest(names: Iterable[str]) -> int:
    """Return a digest of the names of a dataset's shards, in order."""
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))


def reshard(old: list[DataPosition], layout: Layout, processes: int, workers: int) -> list[DataPosition]:
    """Return the positions of `processes` x `workers` slots that together read exactly what `old` had left.

    What a slot of `old` has left of a data epoch E depends on where it stands:

        its epoch is     it has left
        after E          nothing
        E                its buffered samples, the rest of the slice being read, and its later slices
        before E         its whole share of E

    For each epoch that some slot has begun, these are pooled and assigned to the new slots; later epochs are assigned
    as usual.

    Args:
        old: the positions of all processes, by rank, with the same number of workers and the shards of `layout`.
        layout: of the data.
        processes: from now on.
        workers: per process from now on, 0 for none.
    """
    per_process = max(1, workers)
    before = [slot for position in old for slot in position.slots]
    slots = [WorkerSlot(index, processes * per_process) for index in range(processes * per_process)]
    after = [SlotPosition(sum(slot.drawn for slot in before) // len(slots)) for _ in slots]
    for dataset in range(len(layout.shards)):
        remaining = _remaining([slot.streams[dataset] for slot in before], layout, dataset)
        for slot, position in zip(slots, after, strict=True):
            shares = {data_epoch: assign_slices(slices, slot) for data_epoch, slices in remaining.items()}
            position.streams.append(StreamPosition(min(remaining, default=0), shares=shares))
    return [
        DataPosition(workers, 0, after[rank * per_process : (rank + 1) * per_process], list(old[0].shards))
        for rank in range(processes)
    ]


def _remaining(streams: list[StreamPosition], layout: Layout, dataset: int) -> dict[int, list[ShardSlice]]:
    """Return what the slots at `streams` have left of each epoch of a dataset that one of them has begun."""
    remaining: dict[int, list[ShardSlice]] = {}
    begun = [epoch for stream in streams for epoch in (stream.data_epoch, *stream.shares)]
    for data_epoch in range(min((stream.data_epoch for stream in streams), default=0), max(begun, default=-1) + 1):
        remaining[data_epoch] = []
        for index, stream in enumerate(streams):
            if stream.data_epoch > data_epoch:
                continue
            slot = WorkerSlot(index, len(streams))
            slices = layout.share(slot, dataset, data_epoch, stream)
            if stream.data_epoch == data_epoch and stream.emitted:
                arrivals = sum(stream.counts) if len(stream.counts) == len(slices) else None
                state = layout.order(slot, dataset, data_epoch).state(stream.emitted, arrivals)
                slices = remaining_slices(slices, stream.counts, state)
            remaining[data_epoch] += slices
    return remaining


def continue_data(
    old: list[DataPosition], new: DataPosition, layout: Layout, rank: int, processes: int
) -> tuple[DataPosition, str | None]:
    """Return where process `rank` of `processes` continues, and a sentence if that is not exactly where it stopped.

    Args:
        old: the positions of all processes of the run before.
        new: the position of this process at the start, with its number of workers and its shards.
        layout: of the data.
        rank: of this process.
        processes: now.
    """
    if not any(position.slots for position in old):
        return new, None
    before, after = max(1, old[0].workers), max(1, new.workers)
    if old[0].shards != new.shards:
        last = max(stream.data_epoch for position in old for slot in position.slots for stream in slot.streams)
        new.slots = [SlotPosition(0, [StreamPosition(last + 1) for _ in layout.shards]) for _ in range(after)]
        return new, "data: train_data names other shards than before the restart; a new epoch of the data begins"
    if (len(old), before) == (processes, after):
        return dataclasses.replace(old[rank], workers=new.workers), None
    drawn = sum(slot.drawn for position in old for slot in position.slots)
    return reshard(old, layout, processes, new.workers)[rank], (
        f"data: resuming after {drawn:,} samples; the rest of the epoch is resharded from {len(old)} processes x "
        f"{before} workers to {processes} x {after} (0 samples repeated, 0 skipped)"
    )
