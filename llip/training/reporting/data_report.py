"""Gathers the data workers' reports: what was used, what was dropped and where, and what is slow."""

import dataclasses
import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llip.data.tar_reader import LOSES_SHARD
from llip.data.worker_stats import LostShard, WorkerReport
from llip.errors import UserError

WAIT_WORTH_A_LINE = 0.1
"""Fraction of the time spent waiting for data above which the log names the slow stage."""
_LINES = 10  # kinds of damage that are logged when they first occur; all are counted
_TABLE_ROWS = 20
_LAST_LOST = 3  # lost shards of each process that an error names
WORST = 200
"""Places of damage that each process names in a checkpoint and in an epoch's table."""
OTHERS = ""
"""Stands for all shards that are not named."""
_ADVICE = {
    "read": "more workers, or faster storage",
    "decode": "more workers, or smaller pictures in the shards",
    "tokenize": "more workers",
    "main_process": "the workers have batches ready, but the training process is slow to take them; check the CPU load",
}

log = logging.getLogger("llip")


@dataclasses.dataclass
class DataCounts:
    """What a process has used and dropped since the run began; stored in checkpoints."""

    used: list[int]  # samples, per dataset
    dropped: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # (shard, reason) -> how often
    shards: Counter[int] = dataclasses.field(default_factory=Counter)  # dataset -> shard slices read
    lost: Counter[int] = dataclasses.field(default_factory=Counter)  # dataset -> those not read to their end
    lost_samples: int = 0  # of lost shards, as far as an index counts them
    last_lost: list[str] = dataclasses.field(default_factory=list)

    def plain(self, worst: int) -> dict[str, Any]:
        """Return plain containers of bounded size: the `worst` places by name, the others summed by reason.

        Each process may drop samples of every shard, and log lines and checkpoints hold the counts of all processes.
        """
        named = self.dropped
        if len(named) > worst:
            places = heapq.nlargest(worst, (place for place in named if place[0] != OTHERS), key=named.__getitem__)
            named = Counter({place: named[place] for place in places})
            rest = self.by_reason()
            rest.subtract(DataCounts([], named).by_reason())
            named |= Counter({(OTHERS, reason): count for reason, count in rest.items()})
        return {
            "used": self.used,
            "dropped": [[*place, count] for place, count in named.items()],
            "shards": dict(self.shards),
            "lost": dict(self.lost),
            "lost_samples": self.lost_samples,
            "last_lost": self.last_lost[-_LAST_LOST:],
        }

    def restore(self, saved: Iterable[dict[str, Any]]) -> None:
        """Add what `plain` returned on several processes."""
        for counts in saved:
            for dataset, count in enumerate(counts["used"][: len(self.used)]):
                self.used[dataset] += count
            for shard, reason, count in counts["dropped"]:
                self.dropped[shard, reason] += count
            self.shards.update(counts.get("shards", {}))
            self.lost.update(counts.get("lost", {}))
            self.lost_samples += counts.get("lost_samples", 0)
            self.last_lost += counts.get("last_lost", [])

    def by_reason(self) -> Counter[str]:
        """Return the dropped samples and lost shards by reason."""
        reasons = Counter[str]()
        for (_, reason), count in self.dropped.items():
            reasons[reason] += count
        return reasons


def sum_counts(everyone: list[dict[str, Any]]) -> DataCounts:
    """Return the sum over processes of what `DataCounts.plain` returned."""
    total = DataCounts([0] * len(everyone[0]["used"]))
    total.restore(everyone)
    return total


class DataReport:
    """Gathers the reports of one process's workers."""

    def __init__(
        self,
        names: list[str],
        counts: DataCounts,
        workers: int,
        shards: Sequence[int] = (),
        max_bad_fraction: float = 1.0,
        known: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Continue from `counts`.

        Args:
            names: of the datasets, for messages.
            counts: advanced in place.
            workers: of this process; 0 if it loads its own batches.
            shards: shard slices that all workers read in one epoch of the data, per dataset.
            max_bad_fraction: fraction of lost shards of a dataset above which the run ends.
            known: samples by shard, as far as an index counts them.
        """
        self.names, self.counts, self.workers = names, counts, workers
        self.shards, self.max_bad_fraction, self.known = shards, max_bad_fraction, known
        self._judged = counts.shards.copy(), counts.lost.copy()  # slices before the present epoch of the data
        self.seconds: Counter[str] = Counter()  # by stage, over the workers, since the last record
        self.memory = [0] * max(1, workers)  # bytes, by worker
        self._logged: set[tuple[str, str]] = set(counts.dropped)
        self._explained: set[str] = set()  # slow stages, in this epoch

    def add(self, report: WorkerReport, batch: int) -> None:
        """Count what came with batch number `batch`; the first few kinds of damage are logged."""
        for dataset, count in enumerate(report.used):
            self.counts.used[dataset] += count
        details = {lost.url: lost.detail for lost in report.lost}
        for shard, reason, count in report.dropped:
            self.counts.dropped[shard, reason] += count
            if (shard, reason) not in self._logged:
                self._logged.add((shard, reason))
                self._warn(shard, _with_detail(reason, details.get(shard, "")))
        for dataset, count in enumerate(report.shards):
            self.counts.shards[dataset] += count
        for lost in report.lost:
            self._add_lost(lost)
        self.seconds.update(report.seconds)
        self.memory[batch % len(self.memory)] = report.memory

    def _add_lost(self, lost: LostShard) -> None:
        self.counts.lost[lost.dataset] += 1
        self.counts.last_lost = [*self.counts.last_lost, _with_detail(lost.url, lost.detail)][-_LAST_LOST:]
        if lost.stride and lost.url in self.known:
            self.counts.lost_samples += max(0, len(range(lost.first, self.known[lost.url], lost.stride)) - lost.read)

    def _check_lost(self, counts: DataCounts) -> None:
        """Raise a `UserError` if more than `max_bad_fraction` of a dataset's shards were lost in an epoch of it.

        Before the end of an epoch the lost shards are compared with all of its shards: those to come may be good.
        """
        before, lost_before = self._judged
        for dataset, shards in enumerate(self.shards):
            read = counts.shards[dataset] - before[dataset]
            lost = counts.lost[dataset] - lost_before[dataset]
            if lost > self.max_bad_fraction * max(read, shards):
                known = f" with {counts.lost_samples:,} samples" if counts.lost_samples else ""
                reasons = ", ".join(
                    f"{reason}: {n}" for reason, n in counts.by_reason().items() if reason in LOSES_SHARD
                )
                raise UserError(
                    f"data: {self.names[dataset]!r}: {lost} of {max(read, shards)} shards are lost{known}, more than "
                    f"max_bad_fraction = {self.max_bad_fraction}; {reasons}; the last ones: "
                    f"{', '.join(counts.last_lost[-_LAST_LOST:])}; check that the shards are there and can be read"
                )
            if read >= shards:
                before[dataset], lost_before[dataset] = counts.shards[dataset], counts.lost[dataset]

    def _warn(self, shard: str, reason: str) -> None:
        if len(self._logged) <= _LINES:
            log.warning("data: dropping from %s: %s (counted from here on)", shard, reason)
        elif len(self._logged) == _LINES + 1:
            log.warning("data: more shards are damaged; they are counted, and listed at the end of the epoch")

    def record(self, everyone: list[dict[str, Any]], wait_fraction: float) -> dict[str, Any]:
        """Return the fields of metrics.jsonl since the last record.

        Args:
            everyone: the counts of all processes, plain.
            wait_fraction: fraction of that time spent waiting for data.

        Raises:
            UserError: too many shards are lost.
        """
        counts = sum_counts(everyone)
        self._check_lost(counts)
        dropped = {reason: count for reason, count in counts.by_reason().items() if reason not in LOSES_SHARD}
        record = {
            "dropped_samples": sum(dropped.values()),
            "dropped": dropped,
            "lost_shards": counts.lost.total(),
            "lost_samples": counts.lost_samples,
            "dataset_samples": counts.used,
            **{f"data_{stage}_seconds": self.seconds[stage] for stage in ("read", "decode", "tokenize", "idle")},
            "data_bottleneck": self.bottleneck() if wait_fraction > WAIT_WORTH_A_LINE else None,
            "worker_memory_mb": max(self.memory) / 2**20,
        }
        self.seconds.clear()
        return record

    def bottleneck(self) -> str | None:
        """Return the stage that limits training, None before any batch."""
        work = {stage: self.seconds[stage] for stage in ("read", "decode", "tokenize")}
        if not any(work.values()):
            return None
        if self.workers and self.seconds["idle"] > sum(work.values()):
            return "main_process"
        return max(work, key=lambda stage: work[stage])

    def explain(self, record: dict[str, Any], wait_fraction: float) -> None:
        """Log the slow stage, once per epoch and stage."""
        slow = record["data_bottleneck"]
        if slow is None or slow in self._explained:
            return
        self._explained.add(slow)
        work = {stage: record[f"data_{stage}_seconds"] for stage in ("read", "decode", "tokenize")}
        total = max(1e-9, sum(work.values()))
        shares = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in work.items())
        log.info(
            "data: %.0f %% of the time is spent waiting for data; the slowest stage is %s (%s): %s",
            100 * wait_fraction,
            slow,
            shares,
            _ADVICE[slow],
        )

    def log_epoch(self, everyone: list[dict[str, Any]]) -> None:
        """Log a table of what has been dropped, and the samples of each dataset if there are several."""
        counts = sum_counts(everyone)
        self._check_lost(counts)
        self._explained.clear()
        if len(self.names) > 1:
            total = max(1, sum(counts.used))
            shares = [
                f"{name}: {used:,} ({used / total:.1%})" for name, used in zip(self.names, counts.used, strict=True)
            ]
            log.info("data: samples so far by dataset: %s", "; ".join(shares))
        if not counts.dropped:
            return
        places = sorted(counts.dropped.items(), key=lambda item: (item[0][0] == OTHERS, -item[1]))
        rows = [f"{count:>10,}  {reason:30}  {shard or '(other shards)'}" for (shard, reason), count in places]
        more = [f"{'':>10}  and {len(rows) - _TABLE_ROWS:,} more"] if len(rows) > _TABLE_ROWS else []
        lost = sum(count for reason, count in counts.by_reason().items() if reason in LOSES_SHARD)
        log.info(
            "data: %s samples dropped so far, %s shards lost\n%s",
            f"{counts.dropped.total() - lost:,}",
            f"{lost:,}",
            "\n".join([f"{'count':>10}  {'reason':30}  shard", *rows[:_TABLE_ROWS], *more]),
        )


def _with_detail(what: str, detail: str) -> str:
    return f"{what} ({detail})" if detail else what
