"""The endless stream of raw samples that one worker slot draws from one dataset, and the mixture of several.

A thread reads the slices of a worker slot, a little ahead; the shuffle buffer holds undecoded samples. A restart
reads again what the buffer held, and resumes in the middle of a shard without reading what came before.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llip.data.order import BufferState, EpochOrder, ShardSlice, WorkerSlot, locate
from llip.data.position import Cursor, Layout, Move, SlotPosition, StreamPosition
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.sources import ShardSource
from llip.data.tar_reader import LOSES_SHARD, Damage, RawSample, read_samples
from llip.data.worker_stats import FIRST_DEADLINE, LostShard, WorkerStats
from llip.errors import UserError

CHANGED = "sample is not there any more"
_EMPTY_EPOCHS = 10  # in a row without a usable sample, each over other shards: then it is not the shards
_MIXTURE_BLOCK = 4096  # draws from one seed: a restart repeats less than this many


class _EpochStart(NamedTuple):
    data_epoch: int
    state: BufferState
    whole: bool  # the slot's whole share of the epoch is to come
    everything: bool  # which is all of the dataset's shards


class _Refill(NamedTuple):
    slot: int  # of the buffer
    sample: RawSample


class _SliceEnd(NamedTuple):
    samples: int


_Item = RawSample | Damage | LostShard | _EpochStart | _Refill | _SliceEnd


class ShardReader:
    """Reads what one worker slot visits of one dataset, epoch after epoch: for a thread of its own."""

    def __init__(
        self,
        urls: Sequence[str],
        dataset: int,
        slot: WorkerSlot,
        layout: Layout,
        position: StreamPosition,
        watch: ReadWatch,
    ) -> None:
        """Prepare to read from `position` on; `watch` is notified of every read."""
        self.urls, self.dataset, self.slot, self.layout = urls, dataset, slot, layout
        self.start, self.watch = position, watch

    def items(self) -> Iterator[_Item]:
        """Yield, for each epoch: its start, the samples that the buffer held, and each slice's samples and end."""
        emitted, counts = self.start.emitted, list(self.start.counts)
        for data_epoch in itertools.count(self.start.data_epoch):
            slices = self.layout.share(self.slot, self.dataset, data_epoch, self.start)
            arrivals = sum(counts) if len(counts) == len(slices) else None
            state = self.layout.order(self.slot, self.dataset, data_epoch).state(emitted, arrivals)
            whole = emitted == 0 and data_epoch not in self.start.shares
            yield _EpochStart(data_epoch, state, whole, len(slices) == len(self.urls))
            yield from self._refill(slices, counts, state)
            done = state.arrived - sum(counts)
            for part in slices[len(counts) :]:
                yield from self._read(part, done)
                done = 0
            emitted, counts = 0, []

    def _refill(self, slices: list[ShardSlice], counts: list[int], state: BufferState) -> Iterator[_Item]:
        """Read the buffered samples again. Damage on the way has been counted before the restart."""
        shards: dict[int, dict[int, int]] = {}  # slice -> number of the sample in its shard -> buffer slot
        for slot, (index, number) in zip(state.buffered, locate(list(state.buffered.values()), counts), strict=True):
            shards.setdefault(index, {})[slices[index].numbers[number]] = slot
        for index, slots in sorted(shards.items()):
            url = self.urls[slices[index].shard]
            for number, item in self._pick(url, iter(sorted(slots))):
                if not isinstance(item, Damage):
                    yield _Refill(slots.pop(number), item)
            yield from [Damage(url, CHANGED)] * len(slots)

    def _read(self, part: ShardSlice, done: int) -> Iterator[_Item]:
        """Yield the samples of a slice after the first `done`, what is damaged, and the end with the count of all."""
        url = self.urls[part.shard]
        for _, item in self._pick(url, iter(part.numbers[done:])):
            if not isinstance(item, Damage):
                yield item
                done += 1
            elif item.reason in LOSES_SHARD:
                stride = part.stride if part.listed is None else 0
                yield LostShard(self.dataset, url, item.reason, item.detail, part.first, stride, done)
            else:
                yield item
        if part.listed is not None:
            yield from [Damage(url, CHANGED)] * len(part.listed[done:])
        yield _SliceEnd(done)

    def _pick(self, url: str, numbers: Iterator[int]) -> Iterator[tuple[int, RawSample | Damage]]:
        """Yield (number, sample) of a shard for those of the ascending `numbers` that it has, and damage on the way."""
        wanted = number = next(numbers, None)
        if number is None:
            return
        for item in read_samples(url, number, self.watch):
            if isinstance(item, Damage):
                yield number, item
                continue
            if number == wanted:
                yield number, item
                wanted = next(numbers, None)
                if wanted is None:
                    return
            number += 1


class ShuffleBuffer:
    """The undecoded samples that one worker slot holds in one epoch: each that arrives replaces one, which is emitted.

    After a restart a sample is None until it has been read again, and stays None if it is gone.
    """

    def __init__(self, order: EpochOrder, arrived: int, emitted: int) -> None:
        """Continue after `arrived` and `emitted` samples, without what is buffered."""
        self.order, self.arrived, self.emitted = order, arrived, emitted
        self.slots: list[RawSample | None] = [None] * min(arrived, order.size)

    def push(self, sample: RawSample) -> Iterator[RawSample | None]:
        """Take a sample; yield the one that it replaces, none while the buffer fills."""
        slot = self.order.slot(self.arrived)
        self.arrived += 1
        if slot == len(self.slots):
            self.slots.append(sample)
            return
        replaced, self.slots[slot] = self.slots[slot], sample
        self.emitted += 1
        yield replaced

    def drain(self) -> Iterator[RawSample | None]:
        """Yield the samples that are left at the end of the epoch."""
        for slot in self.order.final_slots(self.arrived, self.emitted):
            self.emitted += 1
            yield self.slots[slot]


class DatasetStream:
    """The endless shuffled samples of one dataset for one worker slot."""

    def __init__(
        self,
        source: ShardSource,
        dataset: int,
        slot: WorkerSlot,
        layout: Layout,
        position: StreamPosition,
        stats: WorkerStats,
        check: Callable[[RawSample], bool],
        deadline: float,
    ) -> None:
        """Prepare to read from `position` on.

        Args:
            source: with its shards ordered by name.
            dataset: its number.
            slot: the worker slot that reads.
            layout: of all data.
            position: where to start.
            stats: counts damage.
            check: whether a sample can be used; asked about the first ones, until one can.
            deadline: seconds without a byte after which a shard counts as stalled.
        """
        self.source, self.dataset, self.slot, self.layout = source, dataset, slot, layout
        self.stats, self.check, self.deadline = stats, check, deadline
        self.watch = ReadWatch()
        self.reader = ShardReader(source.urls, dataset, slot, layout, position, self.watch)
        self.data_epoch, self.counts = position.data_epoch, list(position.counts)
        self.buffer = ShuffleBuffer(layout.order(slot, dataset, self.data_epoch), 0, position.emitted)
        self._reported = len(self.counts)
        self._empty_epochs = 0  # in a row

    def move(self) -> Move:
        """Return the position, with the counts that have not been reported yet."""
        new, self._reported = self.counts[self._reported :], len(self.counts)
        return Move(self.data_epoch, self.buffer.emitted, new)

    def samples(self) -> Iterator[RawSample | None]:
        """Yield raw samples; None for one that a restart did not find again.

        Raises:
            UserError: a shard stalls, too much is damaged, or an epoch has no usable sample.
        """
        items = read_ahead(self.reader.items(), self.watch, self.deadline, min(self.deadline, FIRST_DEADLINE))
        start = next(items)
        while True:
            assert isinstance(start, _EpochStart), f"an epoch begins with {start!r}"
            self._begin(start)
            used = self.stats.used[self.dataset]
            for item in items:
                if isinstance(item, _EpochStart):
                    break
                yield from self._take(item)
            yield from self.buffer.drain()
            self._check_used(self.stats.used[self.dataset] - used, start)
            start = item

    def _begin(self, start: _EpochStart) -> None:
        if start.data_epoch != self.data_epoch:
            self.data_epoch, self.counts, self._reported = start.data_epoch, [], 0
            self.buffer.emitted = 0
        order = self.layout.order(self.slot, self.dataset, self.data_epoch)
        self.buffer = ShuffleBuffer(order, start.state.arrived, self.buffer.emitted)

    def _take(self, item: _Item) -> Iterator[RawSample | None]:
        match item:
            case dict():
                self.stats.check_pace(item["__url__"])
                if not self.stats.found_usable:  # what is wrong with all of them shows before the buffer is full
                    self.stats.found_usable = self.check(item)
                yield from self.buffer.push(item)
            case _Refill(slot, sample):
                self.buffer.slots[slot] = sample
            case _SliceEnd(samples):
                self.counts.append(samples)
                self.stats.finish_shard(self.dataset)
            case LostShard():
                self.stats.lose_shard(item)
            case Damage():
                self.stats.drop(item.reason, item.url)

    def _check_used(self, used: int, start: _EpochStart) -> None:
        """Raise a `UserError` if an epoch, or several whose shards may all have been bad, had no usable sample."""
        if used:
            self._empty_epochs = 0
            return
        self._empty_epochs += start.whole
        if not (start.whole and (start.everything or self._empty_epochs == _EMPTY_EPOCHS)):
            return
        share = f"worker slot {self.slot.index} of {self.slot.count}"
        pattern, stats = self.source.pattern, self.stats
        if self.buffer.arrived == 0 and not stats.dropped:
            raise UserError(
                f"data: {pattern!r} holds no sample for {share}: its {len(self.source.urls)} shards have fewer samples "
                "than there are worker slots (processes x workers); use fewer workers"
            )
        raise UserError(
            f"data: an epoch of {pattern!r} has no usable sample for {share} ({self.buffer.arrived} read); "
            f"wanted {stats.wanted}; {stats.words()}"
        )


class Mixture:
    """The samples of one worker slot from all datasets, drawn by their weights."""

    def __init__(self, streams: list[DatasetStream], weights: list[float], seed: int, position: SlotPosition) -> None:
        """Prepare to draw from `position` on."""
        self.streams, self.weights, self.drawn = streams, weights, position.drawn
        self.key = f"{seed}/mixture/{streams[0].slot.index}"

    def cursor(self) -> Cursor:
        """Return the position, with the counts that have not been reported yet."""
        return Cursor(self.drawn, [stream.move() for stream in self.streams])

    def samples(self) -> Iterator[tuple[DatasetStream, RawSample | None]]:
        """Yield (its stream, raw sample) for ever."""
        samples = [stream.samples() for stream in self.streams]
        numbers = range(len(self.streams))
        while True:
            block, done = divmod(self.drawn, _MIXTURE_BLOCK)
            draws = random.Random(f"{self.key}/{block}").choices(numbers, self.weights, k=_MIXTURE_BLOCK)
            for number in draws[done:]:
                sample = next(samples[number])
                self.drawn += 1
                yield self.streams[number], sample
