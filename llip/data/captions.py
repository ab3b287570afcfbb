"""Which captions of a sample are used: weighted sources (`caption_keys`), each with one caption or several."""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping

from llip.errors import UserError

MAX_CAPTION = 100_000
"""Characters. What is longer is a page, a dump, or a picture under a wrong name."""
_MAX_MEMBER = 1_000_000  # bytes of a txt or json
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class BadSample(Exception):
    """A sample that cannot be used. `reason` is a short phrase that such samples are counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class CaptionSource:
    """One place captions come from: the `txt` member, or a field of the `json` member."""

    member: str
    field: str | None
    weight: float

    def captions(self, sample: Mapping[str, bytes]) -> list[str]:
        """Return the usable captions of this source, none if it is not there.

        Raises:
            BadSample: it is there in a form that would train on junk (too long, not UTF-8, not json, not a string or
                list).
        """
        if self.member not in sample:
            return []
        if len(sample[self.member]) > _MAX_MEMBER:
            raise BadSample(f"{self.member} is too long")
        try:
            text = sample[self.member].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"{self.member} is not UTF-8") from error
        if self.field is None:
            captions = [text]
        else:
            captions = self._field_captions(text)
        if any(len(caption) > MAX_CAPTION for caption in captions):
            raise BadSample("caption is too long")
        return [caption.strip() for caption in captions if caption.strip()]

    def _field_captions(self, text: str) -> list[str]:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # deep nesting, or a number with thousands of digits
            raise BadSample(f"{self.member} is not json") from error
        if not isinstance(record, dict):
            raise BadSample(f"{self.member} is not an object")
        value = record.get(self.field)
        if value is None:
            return []
        if isinstance(value, str):  # one caption, not a list of characters
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadSample(f"json.{self.field} is neither a string nor a list of strings")
        return value


def parse_caption_keys(text: str) -> tuple[CaptionSource, ...]:
    """Read `caption_keys`: comma-separated `txt` or `json.FIELD`, each with an optional weight `:0.7`.

    Raises:
        UserError: another form, or no positive weight.
    """
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition(":")
        member, _, field = name.partition(".")
        try:
            value = float(weight or 1)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf or not member or (member == "json") != bool(field):
            raise UserError(f"caption_keys: cannot read {part!r}; expected txt, json.FIELD, or json.FIELD:0.7,txt:0.3")
        sources.append(CaptionSource(member, field or None, value))
    if not any(source.weight > 0 for source in sources):
        raise UserError(f"caption_keys = {text!r}: expected at least one source with a positive weight")
    return tuple(sources)


def distinct_captions(sample: Mapping[str, bytes], sources: tuple[CaptionSource, ...]) -> list[str]:
    """Return every caption that `choose_captions` may draw from a sample, once each.

    Raises:
        BadSample: there is none; with the reason of a source that cannot be read, if there is one.
    """
    captions: dict[str, None] = {}
    problem = BadSample("no caption")
    for source in sources:
        try:
            captions |= dict.fromkeys(source.captions(sample))
        except BadSample as error:
            problem = error
    if not captions:
        raise problem
    return list(captions)


def choose_captions(
    sample: Mapping[str, bytes], sources: tuple[CaptionSource, ...], count: int, rng: random.Random, sentences: int = 0
) -> list[str]:
    """Draw captions of a sample: different ones first, and again from all of them where it has fewer.

    Args:
        sample: members by name.
        sources: of `caption_keys`.
        count: of captions to draw.
        rng: decides.
        sentences: at most so many sentences of the sample are merged to a caption; 0: captions as they are.

    Raises:
        BadSample: no source has a caption.
    """
    if sentences:
        return _merge_sentences(sample, sources, count, rng, sentences)
    captions = list(itertools.islice(_draws(sample, sources, rng), count))
    while captions and len(captions) < count:
        captions += itertools.islice(_draws(sample, sources, rng), count - len(captions))
    if not captions:
        raise BadSample("no caption")
    return captions


def _merge_sentences(
    sample: Mapping[str, bytes], sources: tuple[CaptionSource, ...], count: int, rng: random.Random, most: int
) -> list[str]:
    """Draw captions as FLAIR does (Xiao et al. 2025): 1 to `most` sentences, neighbours or any, with equal chance.

    Sentences are those of all sources, whatever their weights, each source after the other.
    """
    captions = [caption for source in sources for caption in source.captions(sample)]
    pool = [sentence for caption in captions for sentence in _SENTENCE_END.split(caption)]
    if not pool:
        raise BadSample("no caption")
    drawn = []
    for _ in range(count):
        length = min(rng.randint(1, most), len(pool))
        first = rng.randrange(len(pool) - length + 1)
        neighbours = rng.random() < 0.5
        drawn.append(" ".join(pool[first : first + length] if neighbours else rng.sample(pool, length)))
    return drawn


def _draws(sample: Mapping[str, bytes], sources: tuple[CaptionSource, ...], rng: random.Random) -> Iterator[str]:
    """Draw a sample's captions one by one, none twice: a source by weight, then one of its captions.

    A source that has none left is out. One of weight 0 is drawn from only if the others have none at all.
    """
    rest, drawn = list(sources), set[str]()
    left: dict[CaptionSource, list[str]] = {}
    while rest:
        weights = [source.weight for source in rest]
        if drawn and not any(weights):
            return
        source = rng.choices(rest, weights)[0] if any(weights) else rest[0]
        if source not in left:
            left[source] = source.captions(sample)
        left[source] = [caption for caption in left[source] if caption not in drawn]
        if not left[source]:
            rest.remove(source)
            continue
        caption = rng.choice(left[source])
        drawn.add(caption)
        yield caption
