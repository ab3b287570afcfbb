"""The doctor's report: findings summed over shards, the values for the config, and both as a table."""

import dataclasses
import shlex
from collections import Counter

import numpy as np

from llip.data.captions import parse_caption_keys
from llip.data.doctor.scan import NO_CAPTION, CaptionFindings, ScanSettings, ShardFindings, source_name
from llip.data.tar_reader import MISSING, ZERO_BYTES
from llip.system.cores import usable_cores

KEYS_HELD = 50_000_000
"""Digests of keys in memory: 8 bytes each, three times that during the comparison. Of more keys, a share is checked."""
_LISTED = 12  # lines of a list in the table
_SUGGESTED_WORKERS = 8
_UNEVEN = 2.0  # times the median shard, or a fraction of it, that is worth a note


@dataclasses.dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of many integers."""

    min: int
    median: int
    max: int

    def __str__(self) -> str:
        return f"{self.min:,} / {self.median:,} / {self.max:,}"


@dataclasses.dataclass(frozen=True)
class CaptionReport:
    """One caption source. `truncated`: share of captions longer than the context."""

    samples: int
    kinds: dict[str, int]
    per_image: Spread
    tokens: Spread
    truncated: float


@dataclasses.dataclass(frozen=True)
class DuplicateReport:
    """Repeated keys. With `checked` < 1 that share of all keys was compared, chosen by digest."""

    within_shards: int
    across_shards: int
    checked: float
    shards: dict[str, int]  # that share keys with another shard -> how many


@dataclasses.dataclass(frozen=True)
class ShardDamage:
    """Damage of one shard: cases by reason, and details of the first case of some."""

    reasons: dict[str, int]
    details: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings on all shards; `dataclasses.asdict` of it is the json document."""

    train_data: str
    shards: int
    samples: int
    usable: int
    samples_per_shard: Spread | None
    bytes: int  # of local shards
    images_checked: str
    members: dict[str, int]
    json_fields: dict[str, dict[str, int]]  # field -> type -> samples
    captions: dict[str, CaptionReport]
    context_length: int
    image_formats: dict[str, int]
    image_modes: dict[str, int]
    image_width: Spread | None
    image_height: Spread | None
    damage: dict[str, int]
    damaged_shards: dict[str, ShardDamage]
    duplicate_keys: DuplicateReport
    notes: list[str]
    config: dict[str, str]


class KeyDigests:
    """Finds repeated keys in bounded memory."""

    def __init__(self, limit: int = KEYS_HELD) -> None:
        self.limit = limit
        self.stride = 1  # a power of two: digests divisible by it are compared, the same ones in every shard
        self.held = 0
        self.by_shard: dict[str, np.ndarray] = {}

    def add(self, url: str, digests: np.ndarray) -> None:
        """Add the sorted `digests` of one shard."""
        self.by_shard[url] = self._chosen(digests)
        self.held += len(self.by_shard[url])
        while self.held > self.limit:
            self.stride *= 2
            self.by_shard = {url: self._chosen(kept) for url, kept in self.by_shard.items()}
            self.held = sum(map(len, self.by_shard.values()))

    def _chosen(self, digests: np.ndarray) -> np.ndarray:
        return digests if self.stride == 1 else digests[digests & np.uint64(self.stride - 1) == 0]

    def report(self) -> DuplicateReport:
        """Return how many keys are repeated."""
        distinct = {url: np.unique(digests) for url, digests in self.by_shard.items()}
        together = np.sort(np.concatenate([*distinct.values(), np.empty(0, np.uint64)]))
        again = together[1:][together[1:] == together[:-1]]
        shards = {url: int(n) for url, digests in distinct.items() if (n := np.isin(digests, again).sum())}
        return DuplicateReport(self.held - len(together), len(again), 1 / self.stride, shards)


class Totals:
    """Sums over shards, in any order."""

    def __init__(self, urls: list[str], settings: ScanSettings) -> None:
        self.urls, self.settings = urls, settings
        self.shards: dict[str, ShardFindings] = {}  # without what is in `sums`
        self.sums = ShardFindings("")
        self.bytes = 0
        self.keys = KeyDigests()

    def add(self, shard: ShardFindings) -> None:
        """Add one shard."""
        self.shards[shard.url] = ShardFindings(
            shard.url, samples=shard.samples, outcomes=shard.outcomes, damage=shard.damage, details=shard.details
        )
        self.bytes += (shard.entry.bytes or 0) if shard.entry else 0
        self.keys.add(shard.url, shard.keys)
        for name in ("suffixes", "fields", "formats", "modes", "widths", "heights"):
            getattr(self.sums, name).update(getattr(shard, name))
        for name, captions in shard.captions.items():
            self.sums.captions.setdefault(name, CaptionFindings()).add(captions)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards.values())

    def suggest_caption_keys(self) -> str:
        """Return `caption_keys` for these shards: list and `txt` at equal weights; '' without captions."""
        sources = self.sums.captions
        samples = {name: sum(source.kinds.values()) for name, source in sources.items()}
        enough = sorted(
            (name for name in sources if samples[name] >= max(samples.values()) / 2),
            key=lambda name: (-samples[name], name),
        )
        lists = [name for name in enough if sources[name].kinds.most_common(1)[0][0] == "list of strings"]
        if "txt" in enough:
            return f"{lists[0]}:0.5,txt:0.5" if lists else "txt"
        return (lists or enough or [""])[0]

    def damage(self, url: str, caption_keys: str) -> Counter[str]:
        """Return the damage of a shard by reason, given the `caption_keys` of the run."""
        shard = self.shards[url]
        reasons = Counter(shard.damage)
        for outcome, count in shard.outcomes.items():
            reason = _reason(outcome, caption_keys)
            if reason:
                reasons[reason] += count
        return reasons

    def report(self, train_data: str) -> Report:
        """Return the report on all shards."""
        sums, settings = self.sums, self.settings
        caption_keys = settings.caption_keys or self.suggest_caption_keys()
        by_shard = {url: self.damage(url, caption_keys) for url in self.urls}
        unusable = sum(
            count
            for shard in self.shards.values()
            for outcome, count in shard.outcomes.items()
            if _reason(outcome, caption_keys)
        )
        usable = self.samples - unusable
        damage: Counter[str] = sum(by_shard.values(), Counter())
        fields: dict[str, dict[str, int]] = {}
        for (field, kind), count in sums.fields.most_common():
            fields.setdefault(field, {})[kind] = count
        duplicates = self.keys.report()
        per_shard = _spread(Counter(shard.samples for shard in self.shards.values()))
        captions = {name: _caption_report(source, settings) for name, source in sorted(sums.captions.items())}
        return Report(
            train_data=train_data,
            shards=len(self.urls),
            samples=self.samples,
            usable=usable,
            samples_per_shard=per_shard,
            bytes=self.bytes,
            images_checked="decoded" if settings.full_images else "headers",
            members=dict(sums.suffixes.most_common()),
            json_fields=fields,
            captions=captions,
            context_length=settings.context_length,
            image_formats=dict(sums.formats.most_common()),
            image_modes=dict(sums.modes.most_common()),
            image_width=_spread(sums.widths),
            image_height=_spread(sums.heights),
            damage=dict(damage.most_common()),
            damaged_shards={
                url: ShardDamage(dict(reasons.most_common()), {k: v for k, v in self.shards[url].details.items() if v})
                for url, reasons in sorted(by_shard.items(), key=lambda pair: (-sum(pair[1].values()), pair[0]))
                if reasons
            },
            duplicate_keys=duplicates,
            notes=_notes(damage, per_shard, duplicates, captions, caption_keys, usable),
            config=_config(train_data, usable, caption_keys, len(self.urls)),
        )


def _reason(outcome: tuple, caption_keys: str) -> str:
    """Return why a sample of this outcome is unusable, or ''."""
    image, good, bad = outcome
    if image:
        return image
    names = {source_name(source) for source in parse_caption_keys(caption_keys)} if caption_keys else set()
    members = {name.partition(".")[0] for name in names if "." in name}  # an unreadable json spoils all its fields
    spoiled = [reason for name, reason in bad if name in names or name in members]
    if spoiled:
        return spoiled[0]
    return "" if names.intersection(good) else NO_CAPTION


def _spread(counts: Counter[int]) -> Spread | None:
    if not counts:
        return None
    values = np.array(sorted(counts))
    upto = np.cumsum([counts[int(value)] for value in values])
    middle = values[np.searchsorted(upto, (upto[-1] + 1) // 2)]  # the lower one of two
    return Spread(int(values[0]), int(middle), int(values[-1]))


def _caption_report(source: CaptionFindings, settings: ScanSettings) -> CaptionReport:
    per_image, tokens = _spread(source.per_image), _spread(source.tokens)
    assert per_image is not None, "a caption source is listed when it has a caption"
    assert tokens is not None, "a caption has a length"
    long = sum(count for length, count in source.tokens.items() if length > settings.context_length)
    share = long / sum(source.tokens.values())
    return CaptionReport(sum(source.kinds.values()), dict(source.kinds.most_common()), per_image, tokens, share)


def _notes(
    damage: Counter[str],
    per_shard: Spread | None,
    duplicates: DuplicateReport,
    captions: dict[str, CaptionReport],
    caption_keys: str,
    usable: int,
) -> list[str]:
    notes = []
    if damage.keys() & {MISSING, ZERO_BYTES}:
        notes.append("training refuses to start while shards are missing or empty: remove them from train_data")
    if not usable:
        notes.append("no sample can be used: there is nothing to train on")
    if not caption_keys:
        notes.append("no captions were found; name the json field that holds them with --caption-keys json.FIELD")
    share = f" (among {duplicates.checked:.1%} of the keys)" if duplicates.checked < 1 else ""
    if duplicates.within_shards:
        notes.append(f"{duplicates.within_shards:,} keys are repeated in their shard{share}: members out of order?")
    if duplicates.across_shards:
        notes.append(
            f"{duplicates.across_shards:,} keys are repeated in another shard{share}: fine if only names repeat; "
            "repeated samples are trained on twice"
        )
    if per_shard and (per_shard.max > _UNEVEN * per_shard.median or per_shard.min * _UNEVEN < per_shard.median):
        notes.append(f"uneven shards: {per_shard} samples (min / median / max)")
    notes += [
        f"{name}: {source.truncated:.0%} of the captions are truncated at the context length"
        for name, source in captions.items()
        if source.truncated >= 0.1
    ]
    return notes


def _config(train_data: str, usable: int, caption_keys: str, shards: int) -> dict[str, str]:
    values = {
        "train_data": train_data,
        "train_num_samples": str(usable),
        "caption_keys": caption_keys,
        "workers": str(min(usable_cores(), shards, _SUGGESTED_WORKERS)),
    }
    return {name: value for name, value in values.items() if value}


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_LISTED])
    return (shown + (f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else "")) or "none"


def _caption_lines(report: Report) -> list[tuple[str, str]]:
    lines = []
    for name, source in report.captions.items():
        lines.append((f"captions {name}", f"in {source.samples:,} samples as {_counts(source.kinds)}"))
        lines.append(("  per image", f"{source.per_image} (min / median / max)"))
        cut = f"{source.truncated:.1%} longer than {report.context_length}"
        lines.append(("  tokens", f"{source.tokens} (min / median / max), {cut}"))
    return lines or [("captions", "none")]


def as_table(report: Report) -> str:
    """Return the report as text."""
    unusable = report.samples - report.usable
    lines = [
        ("shards", f"{report.shards:,}, {report.bytes / 1e6:,.1f} MB"),
        ("samples", f"{report.samples:,}: {report.usable:,} usable, {unusable:,} not"),
        ("samples per shard", f"{report.samples_per_shard} (min / median / max)"),
        ("members", _counts(report.members)),
        *[(f"json.{field}", _counts(kinds)) for field, kinds in list(report.json_fields.items())[: 2 * _LISTED]],
        *_caption_lines(report),
        (f"images ({report.images_checked})", _counts(report.image_formats)),
        ("  modes", _counts(report.image_modes)),
        ("  width", f"{report.image_width or 'none'} (min / median / max)"),
        ("  height", f"{report.image_height or 'none'} (min / median / max)"),
    ]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:{width}}  {value}" for name, value in lines]
    text += ["", f"damage: {_counts(report.damage)}"]
    for url, damage in list(report.damaged_shards.items())[:_LISTED]:
        text.append(f"  {url}: {_counts(damage.reasons)}")
        text += [f"    {reason}: {detail}" for reason, detail in damage.details.items()]
    if len(report.damaged_shards) > _LISTED:
        text.append(f"  and {len(report.damaged_shards) - _LISTED:,} more shards; --json lists all")
    text += [f"note: {note}" for note in report.notes]
    text += ["", "for the command line of python -m llip.main (workers: per training process, on this machine):"]
    quoted = [shlex.quote(f"{name}={value}") for name, value in report.config.items()]
    return "\n".join([*text, "  " + " \\\n  ".join(quoted)])
