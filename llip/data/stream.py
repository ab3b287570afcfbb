"""The endless stream of raw samples that one worker slot draws from one dataset, and the mixture of several.

A thread reads the slices of a worker slot, a little ahead; the shuffle buffer holds undecoded samples. A restart
reads again what the buffer held, and resumes in the middle of a shard without reading what came before.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llip.data.order import BufferState, ShardSlice, WorkerSlot, locate
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
    slot: int
    sample: RawSample


class _SliceEnd(NamedTuple):
    samples: int


class _EpochEnd(NamedTuple):
    data_epoch: int


_Item = _EpochStart | _Refill | _SliceEnd | LostShard | _EpochEnd | Damage | RawSample


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
        self.start, self.stats, self.check, self.deadline = position, stats, check, deadline
        self.watch = ReadWatch()
        self.data_epoch, self.emitted, self.counts = position.data_epoch, position.emitted, list(position.counts)
        self._reported = len(self.counts)
        self._empty_epochs = 0  # in a row

    def move(self) -> Move:
        """Return the position, with the counts that have not been reported yet."""
        new, self._reported = self.counts[self._reported :], len(self.counts)
        return Move(self.data_epoch, self.emitted, new)

    def samples(self) -> Iterator[RawSample | None]:
        """Yield raw samples; None for one that a restart did not find again.

        Raises:
            UserError: a shard stalls, too much is damaged, or an epoch has no usable sample.
        """
        items = read_ahead(self._items(), self.watch, self.deadline, min(self.deadline, FIRST_DEADLINE))
        for start in items:
            assert isinstance(start, _EpochStart), f"an epoch begins with {start!r}"
            yield from self._epoch(start, items)

    def _epoch(self, start: _EpochStart, items: Iterator[_Item]) -> Iterator[RawSample | None]:
        if start.data_epoch != self.data_epoch:
            self.data_epoch, self.emitted, self.counts, self._reported = start.data_epoch, 0, [], 0
        order = self.layout.order(self.slot, self.dataset, self.data_epoch)
        used, arrived = self.stats.used[self.dataset], start.state.arrived
        slots: list[RawSample | None] = [None] * min(arrived, order.size)
        for item in items:
            if isinstance(item, dict):
                self.stats.check_pace(item["__url__"])
                if not self.stats.found_usable:
                    self._check(item)
                if arrived < order.size:
                    slots.append(item)
                else:
                    slot = order.slot(arrived)
                    sample, slots[slot] = slots[slot], item
                    self.emitted += 1
                    yield sample
                arrived += 1
            elif isinstance(item, _SliceEnd):
                self.counts.append(item.samples)
                self.stats.finish_shard(self.dataset)
            elif isinstance(item, LostShard):
                self.stats.lose_shard(item)
            elif isinstance(item, Damage):
                self.stats.drop(item.reason, item.url)
            elif isinstance(item, _Refill):
                slots[item.slot] = item.sample
            else:
                assert item == _EpochEnd(self.data_epoch), f"{item!r} ends epoch {self.data_epoch}"
                break
        for slot in order.final_slots(arrived, self.emitted):
            self.emitted += 1
            yield slots[slot]
        if self.stats.used[self.dataset] > used:
            self._empty_epochs = 0
        elif start.whole:  # other shards may be good
            self._empty_epochs += 1
            if start.everything or self._empty_epochs == _EMPTY_EPOCHS:
                self._explain_nothing(arrived)

    def _check(self, sample: RawSample) -> None:
        """Look at a sample as it comes: what is wrong with all of them shows before the buffer is full."""
        self.stats.found_usable = self.check(sample)

    def _explain_nothing(self, arrived: int) -> None:
        share = f"worker slot {self.slot.index} of {self.slot.count}"
        pattern, stats = self.source.pattern, self.stats
        if arrived == 0 and not stats.dropped:
            raise UserError(
                f"data: {pattern!r} holds no sample for {share}: its {len(self.source.urls)} shards have fewer samples "
                "than there are worker slots (processes x workers); use fewer workers"
            )
        raise UserError(
            f"data: an epoch of {pattern!r} has no usable sample for {share} ({arrived} read); wanted {stats.wanted}; "
            f"{stats.words()}"
        )

    # Below: in the reading thread.

    def _items(self) -> Iterator[_Item]:
        emitted, counts = self.start.emitted, list(self.start.counts)
        for data_epoch in itertools.count(self.start.data_epoch):
            slices = self.layout.share(self.slot, self.dataset, data_epoch, self.start)
            arrivals = sum(counts) if len(counts) == len(slices) else None
            state = self.layout.order(self.slot, self.dataset, data_epoch).state(emitted, arrivals)
            whole = emitted == 0 and data_epoch not in self.start.shares
            yield _EpochStart(data_epoch, state, whole, len(slices) == len(self.source.urls))
            yield from self._refill(slices, counts, state)
            done = state.arrived - sum(counts)
            for part in slices[len(counts) :]:
                yield from self._read(part, done)
                done = 0
            yield _EpochEnd(data_epoch)
            emitted, counts = 0, []

    def _read(self, part: ShardSlice, done: int) -> Iterator[_Item]:
        """Yield the samples of a slice after the first `done`, damage, and the end with the count of all."""
        url = self.source.urls[part.shard]
        items = (
            self._pick(url, part.listed[done:])
            if part.listed is not None
            else _numbered(read_samples(url, part.sample(done), self.watch), 0)
        )
        for number, item in items:
            if isinstance(item, Damage):
                stride = part.stride if part.listed is None else 0
                lost = LostShard(self.dataset, url, item.reason, item.detail, part.first, stride, done)
                yield lost if item.reason in LOSES_SHARD else item
            elif part.listed is not None or number % part.stride == 0:
                yield item
                done += 1
        yield _SliceEnd(done)

    def _pick(self, url: str, listed: list[int]) -> Iterator[tuple[int, RawSample | Damage]]:
        """Yield (number, sample) of the listed samples of a shard, damage, and one `Damage` for each that is gone."""
        wanted = iter(listed)
        number = next(wanted, None)
        if number is None:
            return
        for index, item in _numbered(read_samples(url, number, self.watch), number):
            if isinstance(item, Damage):
                yield index, item
            elif index == number:
                yield number, item
                number = next(wanted, None)
                if number is None:
                    return
        for missing in itertools.chain([number], wanted):
            yield missing, Damage(url, CHANGED, f"sample {missing}")

    def _refill(self, slices: list[ShardSlice], counts: list[int], state: BufferState) -> Iterator[_Item]:
        """Read the buffered samples again. Damage on the way has been counted before the restart."""
        places: dict[int, dict[int, int]] = {}  # slice -> sample of the shard -> slot
        for slot, (index, number) in zip(state.buffered, locate(list(state.buffered.values()), counts), strict=True):
            places.setdefault(index, {})[slices[index].sample(number)] = slot
        for index, slots in sorted(places.items()):
            for number, item in self._pick(self.source.urls[slices[index].shard], sorted(slots)):
                if not isinstance(item, Damage):
                    yield _Refill(slots[number], item)
                elif item.reason == CHANGED:
                    yield item


def _numbered(items: Iterator[RawSample | Damage], first: int) -> Iterator[tuple[int, RawSample | Damage]]:
    """Yield (number of the sample in its shard, item); damage has the number of the sample after it."""
    number = first
    for item in items:
        yield number, item
        number += not isinstance(item, Damage)


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
