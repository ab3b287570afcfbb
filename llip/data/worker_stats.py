"""What one data worker read, used and dropped, in counts and in words; and when too little is usable to continue."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llip.errors import UserError

FIRST_DEADLINE = 45.0
"""Seconds without a usable sample after which a worker gives up."""
SLOW_DEADLINE = 150.0
"""Seconds of one batch after which a worker gives up although data flow, before the process that waits gives up."""
_ENOUGH_TO_JUDGE = 200  # samples read before the fraction of bad ones means something
_PAGE = os.sysconf("SC_PAGE_SIZE")


class LostShard(NamedTuple):
    """A shard that was not read to its end, and why: of its samples `first`, `first + stride`, ... came `read`."""

    dataset: int
    url: str
    reason: str
    detail: str
    first: int
    stride: int  # 0: single samples were wanted, which count as dropped
    read: int


class WorkerReport(NamedTuple):
    """What a worker reports with each batch, counted since its last one."""

    dropped: list[tuple[str, str, int]]  # shard, reason, samples; 1 for a lost shard
    used: list[int]  # samples, per dataset
    seconds: dict[str, float]  # by stage
    memory: int  # resident bytes of the worker's process, now
    shards: Sequence[int] = ()  # shard slices finished or lost, per dataset
    lost: Sequence[LostShard] = ()


def resident_bytes() -> int:
    """Return the resident memory of this process, 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


class WorkerStats:
    """Counts what a worker read and dropped, and ends the run if too little is usable."""

    def __init__(self, max_bad_fraction: float, datasets: int, wanted: str) -> None:
        """Start counting.

        Args:
            max_bad_fraction: fraction of bad samples above which the run ends.
            datasets: how many.
            wanted: what a usable sample has, in words.
        """
        self.max_bad_fraction, self.wanted = max_bad_fraction, wanted
        self.began = self.batch_began = time.monotonic()
        self.seen, self.bad, self.found_usable = 0, 0, False
        self.used = [0] * datasets
        self.dropped: Counter[tuple[str, str]] = Counter()  # (shard, reason)
        self.details: dict[str, str] = {}  # reason -> what happened to the last shard lost for it
        self.members: Counter[str] = Counter()  # member names of samples that cannot be used
        self._start_report()

    def _start_report(self) -> None:
        """Start counting for the next report."""
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by stage
        self._new_used, self._new_shards = [0] * len(self.used), [0] * len(self.used)
        self._new_dropped: Counter[tuple[str, str]] = Counter()
        self._new_lost: list[LostShard] = []

    def use(self, dataset: int) -> None:
        """Count a good sample."""
        self.seen += 1
        self.used[dataset] += 1
        self._new_used[dataset] += 1
        self.found_usable = True

    def drop(self, reason: str, shard: str, sample: Iterable[str] = ()) -> None:
        """Count a sample that cannot be used, with its members' names.

        Raises:
            UserError: too large a fraction of the samples is bad, or none was usable for too long.
        """
        self.seen += 1
        self.bad += 1
        self.dropped[shard, reason] += 1
        self._new_dropped[shard, reason] += 1
        self._note_members(sample)
        if self.seen >= _ENOUGH_TO_JUDGE and self.bad > self.max_bad_fraction * self.seen:
            raise UserError(
                f"data: more than max_bad_fraction = {self.max_bad_fraction} of the samples cannot be used: "
                f"{self.bad} of {self.seen}; {self.words()}"
            )
        self.check_start(self.dropped)

    def finish_shard(self, dataset: int) -> None:
        """Count a shard slice that was read, lost or not."""
        self._new_shards[dataset] += 1

    def lose_shard(self, lost: LostShard) -> None:
        """Count a lost shard. The training process, which sees those of all workers, decides when there are too many.

        Raises:
            UserError: no sample was usable for too long.
        """
        self._new_lost.append(lost)
        self.dropped[lost.url, lost.reason] += 1
        self._new_dropped[lost.url, lost.reason] += 1
        self.details[lost.reason] = lost.detail
        self.check_start(self.dropped)

    def check_start(self, bad: Counter[tuple[str, str]], sample: Iterable[str] = ()) -> None:
        """Give up if no sample was usable: none of the first ones, or none in time.

        Raises:
            UserError: what is wanted, and what was read.
        """
        self._note_members(sample)
        seconds = time.monotonic() - self.began
        if not self.found_usable and (bad.total() >= _ENOUGH_TO_JUDGE or seconds > FIRST_DEADLINE):
            raise UserError(
                f"data: the first {bad.total()} samples or shards, read in {seconds:.0f} s, cannot be used; wanted "
                f"{self.wanted}; {self.words(bad)}"
            )

    def check_pace(self, shard: str) -> None:
        """Give up if the current batch takes too long.

        Raises:
            UserError: names the shard being read.
        """
        seconds = time.monotonic() - self.batch_began
        if seconds > SLOW_DEADLINE:
            raise UserError(
                f"data: no batch in {seconds:.0f} s, though bytes arrive; {shard!r} is being read and {self.seen} "
                "samples were seen so far; check the storage or the network, or set a smaller shuffle_buffer"
            )

    def report(self) -> WorkerReport:
        """Return what happened since the last report."""
        dropped = [(*place, count) for place, count in self._new_dropped.items()]
        new = self._new_used, dict(self.seconds), resident_bytes(), self._new_shards, self._new_lost
        self._start_report()
        return WorkerReport(dropped, *new)

    def words(self, dropped: Counter[tuple[str, str]] | None = None) -> str:
        """Return what was dropped and from where, and which members there were, as a sentence."""
        dropped = self.dropped if dropped is None else dropped
        reasons, shards = Counter[str](), Counter[str]()
        for (shard, reason), count in dropped.items():
            reasons[reason] += count
            shards[shard] += count
        details = {reason: f" ({detail})" for reason, detail in self.details.items() if detail}
        by_reason = ", ".join(f"{reason}{details.get(reason, '')}: {count}" for reason, count in reasons.most_common(8))
        by_shard = ", ".join(f"{shard} ({count})" for shard, count in shards.most_common(3))
        members = ", ".join(sorted(self.members)[:12]) or "none"
        return f"dropped {by_reason or 'none'}; worst shards: {by_shard or 'none'}; member names seen: {members}"

    def _note_members(self, sample: Iterable[str]) -> None:
        if len(self.members) < 100:  # where names are data, a list of all says nothing
            self.members.update(name for name in sample if not name.startswith("__"))
