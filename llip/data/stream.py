"""The endless stream of raw samples that one reader draws from one dataset, and the mixture of several.

A thread reads the pieces of the reader's share, a little ahead; the shuffle buffer holds undecoded samples. A restart
reads again what the buffer held, and goes on in the middle of a shard without reading what came before.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llip.data.order import Piece, Reader, Standing, locate
from llip.data.position import Cursor, Layout, Move, ReaderPosition, StreamPosition
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.sources import ShardSource
from llip.data.tar_reader import LOSES_SHARD, Damage, RawSample, read_samples
from llip.data.worker_stats import FIRST_DEADLINE, LostShard, WorkerStats
from llip.errors import UserError

CHANGED = "sample is not there any more"
_EMPTY_PASSES = 10  # in a row without a usable sample, each over other shards: then it is not the shards
_MIXTURE_BLOCK = 4096  # draws from one seed: a restart repeats less than this many


class _PassStart(NamedTuple):
    pass_index: int
    standing: Standing
    whole: bool  # the reader's whole share is to come
    everything: bool  # which is all of the dataset's shards


class _Refill(NamedTuple):
    slot: int
    sample: RawSample


class _PieceEnd(NamedTuple):
    samples: int


class _Lost(NamedTuple):
    shard: LostShard
    reason: str


class _PassEnd(NamedTuple):
    pass_index: int


_Item = _PassStart | _Refill | _PieceEnd | _Lost | _PassEnd | Damage | RawSample


class DatasetStream:
    """One reader's samples of one dataset, for ever, shuffled."""

    def __init__(
        self,
        source: ShardSource,
        dataset: int,
        reader: Reader,
        layout: Layout,
        position: StreamPosition,
        tally: WorkerStats,
        check: Callable[[RawSample], bool],
        deadline: float,
    ) -> None:
        """Prepare to read from `position` on.

        Args:
            source: with its shards ordered by name.
            dataset: its number.
            reader: whose share it is.
            layout: of all data.
            position: where to start.
            tally: is told of damage.
            check: tells whether a sample can be used; asked about the first ones, until one can.
            deadline: seconds without a byte after which a shard counts as stalled.
        """
        self.source, self.dataset, self.reader, self.layout = source, dataset, reader, layout
        self.start, self.tally, self.check, self.deadline = position, tally, check, deadline
        self.watch = ReadWatch()
        self.pass_index, self.emitted, self.counts = position.pass_index, position.emitted, list(position.counts)
        self._told = len(self.counts)
        self._empty_passes = 0  # in a row

    def move(self) -> Move:
        """Return where the stream stands, with the counts that have not been told yet."""
        new, self._told = self.counts[self._told :], len(self.counts)
        return Move(self.pass_index, self.emitted, new)

    def samples(self) -> Iterator[RawSample | None]:
        """Yield raw samples; None in the place of one that a restart did not find again.

        Raises:
            UserError: a shard stalls, too much is damaged, or a pass has nothing that can be used.
        """
        items = read_ahead(self._items(), self.watch, self.deadline, min(self.deadline, FIRST_DEADLINE))
        for start in items:
            assert isinstance(start, _PassStart), f"a pass begins with {start!r}"
            yield from self._pass(start, items)

    def _pass(self, start: _PassStart, items: Iterator[_Item]) -> Iterator[RawSample | None]:
        if start.pass_index != self.pass_index:
            self.pass_index, self.emitted, self.counts, self._told = start.pass_index, 0, [], 0
        order = self.layout.order(self.reader, self.dataset, self.pass_index)
        used, arrived = self.tally.used[self.dataset], start.standing.arrived
        slots: list[RawSample | None] = [None] * min(arrived, order.size)
        for item in items:
            if isinstance(item, dict):
                self.tally.check_pace(item["__url__"])
                if not self.tally.found_usable:
                    self._check(item)
                if arrived < order.size:
                    slots.append(item)
                else:
                    slot = order.slot(arrived)
                    sample, slots[slot] = slots[slot], item
                    self.emitted += 1
                    yield sample
                arrived += 1
            elif isinstance(item, _PieceEnd):
                self.counts.append(item.samples)
                self.tally.finish_shard(self.dataset)
            elif isinstance(item, _Lost):
                self.tally.lose_shard(item.shard, item.reason)
            elif isinstance(item, Damage):
                self.tally.drop(item.reason, item.url)
            elif isinstance(item, _Refill):
                slots[item.slot] = item.sample
            else:
                assert item == _PassEnd(self.pass_index), f"{item!r} ends pass {self.pass_index}"
                break
        for slot in order.last(arrived)[self.emitted - max(0, arrived - order.size) :]:
            self.emitted += 1
            yield slots[slot]
        if self.tally.used[self.dataset] > used:
            self._empty_passes = 0
        elif start.whole:  # other shards may be good
            self._empty_passes += 1
            if start.everything or self._empty_passes == _EMPTY_PASSES:
                self._explain_nothing(arrived)

    def _check(self, sample: RawSample) -> None:
        """Look at a sample as it comes: what is wrong with all of them shows before the buffer is full."""
        self.tally.found_usable = self.check(sample)

    def _explain_nothing(self, arrived: int) -> None:
        share = f"reader {self.reader.index} of {self.reader.count}"
        pattern, tally = self.source.pattern, self.tally
        if arrived == 0 and not tally.dropped:
            raise UserError(
                f"data: {pattern!r} holds no sample for {share}: its {len(self.source.urls)} shards have fewer samples "
                "than there are readers (processes x workers); use fewer workers"
            )
        raise UserError(
            f"data: a pass over {pattern!r} gave {share} no usable sample ({arrived} read); wanted {tally.wanted}; "
            f"{tally.words()}"
        )

    # Below: in the reading thread.

    def _items(self) -> Iterator[_Item]:
        emitted, counts = self.start.emitted, list(self.start.counts)
        for pass_index in itertools.count(self.start.pass_index):
            pieces = self.layout.share(self.reader, self.dataset, pass_index, self.start)
            arrivals = sum(counts) if len(counts) == len(pieces) else None
            standing = self.layout.order(self.reader, self.dataset, pass_index).standing(emitted, arrivals)
            whole = emitted == 0 and pass_index not in self.start.shares
            yield _PassStart(pass_index, standing, whole, len(pieces) == len(self.source.urls))
            yield from self._refill(pieces, counts, standing)
            done = standing.arrived - sum(counts)
            for piece in pieces[len(counts) :]:
                yield from self._read(piece, done)
                done = 0
            yield _PassEnd(pass_index)
            emitted, counts = 0, []

    def _read(self, piece: Piece, done: int) -> Iterator[_Item]:
        """Yield the samples of a piece after the first `done`, damage, and the end with the count of all."""
        url = self.source.urls[piece.shard]
        items = (
            self._pick(url, piece.listed[done:])
            if piece.listed is not None
            else _numbered(read_samples(url, piece.sample(done), self.watch), 0)
        )
        for number, item in items:
            if isinstance(item, Damage):
                lost = LostShard(self.dataset, url, piece.first, 0 if piece.listed else piece.stride, done)
                yield _Lost(lost, item.reason) if item.reason in LOSES_SHARD else item
            elif piece.listed is not None or number % piece.stride == 0:
                yield item
                done += 1
        yield _PieceEnd(done)

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

    def _refill(self, pieces: list[Piece], counts: list[int], standing: Standing) -> Iterator[_Item]:
        """Read again what the buffer holds. Damage on the way has been counted before the restart."""
        places: dict[int, dict[int, int]] = {}  # piece -> sample of the shard -> slot
        for slot, (piece, number) in zip(standing.held, locate(list(standing.held.values()), counts), strict=True):
            places.setdefault(piece, {})[pieces[piece].sample(number)] = slot
        for piece, slots in sorted(places.items()):
            for number, item in self._pick(self.source.urls[pieces[piece].shard], sorted(slots)):
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
    """One reader's samples from all datasets, drawn by their weights."""

    def __init__(self, streams: list[DatasetStream], weights: list[float], seed: int, position: ReaderPosition) -> None:
        """Prepare to draw from `position` on."""
        self.streams, self.weights, self.drawn = streams, weights, position.drawn
        self.key = f"{seed}/mixture/{streams[0].reader.index}"

    def cursor(self) -> Cursor:
        """Return where the reader stands, with the counts that have not been told yet."""
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
