"""From a `Scene` to sentences: the facts that are true of it, each with several ways to say it.

A caption states one fact (or where two things are) and omits all others: this is the caption diversity that the
dataset is made for. Every caption fits in 16 tokens of CLIP's tokenizer.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import ClassVar

import numpy as np

from llip.scenes.world import Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Ways to say each relation. Left and right relate things in one row, above and below things in one column."""


@dataclass(frozen=True)
class Mention:
    """A thing as a caption names it; `size` is None where the caption omits it."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.color, self.shape)))


class Fact:
    """What all facts have: a `kind` and `templates`, wordings whose {fields} are those of the fact."""

    kind: ClassVar[str]
    templates: ClassVar[tuple[str, ...]]

    def record(self) -> dict:
        """Return the fact as json holds it."""
        fields = {name: vars(v) if isinstance(v, Mention) else v for name, v in vars(self).items()}
        return {"kind": self.kind, **fields}


@dataclass(frozen=True)
class Place(Fact):
    """A thing is in a cell."""

    kind = "place"
    templates = (
        "a {thing} in the {place}",
        "in the {place}, a {thing}",
        "there is a {thing} in the {place}",
        "the {place} shows a {thing}",
        "{place}: {thing}",
    )
    thing: Mention
    place: str


@dataclass(frozen=True)
class TwoPlaces(Fact):
    """Two things are in two cells."""

    kind = "two_places"
    templates = (
        "{thing} in the {place}, {other} in the {other_place}",
        "a {thing} {place}, a {other} {other_place}",
        "{place}: a {thing}, {other_place}: a {other}",
    )
    thing: Mention
    place: str
    other: Mention
    other_place: str


@dataclass(frozen=True)
class Presence(Fact):
    """A thing is somewhere in the picture."""

    kind = "presence"
    templates = (
        "a {thing}",
        "there is a {thing}",
        "a picture with a {thing}",
        "one of the shapes is a {thing}",
    )
    thing: Mention


@dataclass(frozen=True)
class Relation(Fact):
    """How two things lie to each other; `relation` is a key of `RELATIONS`."""

    kind = "relation"
    templates = ("a {thing} {relation} a {other}", "the {thing} is {relation} the {other}")
    thing: Mention
    relation: str
    other: Mention


@dataclass(frozen=True)
class Background(Fact):
    """The colour behind the things."""

    kind = "background"
    templates = (
        "shapes on a {color} background",
        "a {color} background",
        "a picture with a {color} background",
        "the background is {color}",
    )
    color: str


@dataclass(frozen=True)
class Count(Fact):
    """How many things there are: of a shape, of a colour, or (both None) in all."""

    kind = "count"
    templates = (
        "{number} {noun}",
        "a picture with {number} {noun}",
        "there are {number} {noun}",
    )
    number: int
    shape: str | None = None
    color: str | None = None

    @property
    def noun(self) -> str:
        """The plural of what is counted."""
        noun = self.shape or "shape"
        plural = noun + ("es" if noun.endswith("s") else "s")
        return f"{self.color} {plural}" if self.color else plural


TRAIN_SHARES = {"place": 0.5, "two_places": 0.15, "relation": 0.1, "presence": 0.1, "background": 0.1, "count": 0.05}
"""Share of each kind among the captions drawn. Places are the majority: they distinguish pictures best.

A scene of two things has few places to state, so over all captions they come less often than this (0.58 of them).
"""

RETRIEVAL_KINDS = ("place", "place", "two_places")
"""The captions of a retrieval picture, in order; a scene of two things has just these.

A place is true of about seven pictures in 800, two places most often of one. So with 800 pictures (seed 0) no model
can expect more than 41 % of text-to-image recall at 1, 82 % at 5 and 99 % at 10.
"""

_SIZED_SHARE = 0.4  # of the mentions that may or may not state the size
_CUMULATIVE = np.cumsum(list(TRAIN_SHARES.values())).tolist()


def mixed_captions(scene: Scene, count: int, rng: np.random.Generator) -> tuple[list[str], list[Fact]]:
    """Return `count` different captions of a scene, drawn by `TRAIN_SHARES`, and the fact that each states."""
    kinds = list(TRAIN_SHARES)
    endless = (kinds[bisect(_CUMULATIVE, u * _CUMULATIVE[-1])] for u in iter(rng.random, None))
    return _draw_captions(scene, endless, count, _SIZED_SHARE, rng)


def retrieval_captions(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[Fact]]:
    """Return captions of the kinds in `RETRIEVAL_KINDS`, in that order, and the fact that each states."""
    return _draw_captions(scene, iter(RETRIEVAL_KINDS), len(RETRIEVAL_KINDS), 1.0, rng)


def _draw_captions(
    scene: Scene, kinds: Iterator[str], count: int, sized_share: float, rng: np.random.Generator
) -> tuple[list[str], list[Fact]]:
    """Return captions of `count` different facts of the kinds that `kinds` yields, skipping kinds that have run out."""

    def name(thing: Thing) -> Mention:
        return Mention(thing.color, thing.shape, thing.size if rng.random() < sized_share else None)

    left: dict[str, list[Fact]] = {}
    facts: list[Fact] = []
    while len(facts) < count:
        kind = next(kinds)
        if kind not in left:
            true = _TRUE_FACTS[kind](scene, name)
            left[kind] = [true[i] for i in rng.permutation(len(true))]
        if left[kind]:
            facts.append(left[kind].pop())
    return [say(fact, rng) for fact in facts], facts


def say(fact: Fact, rng: np.random.Generator) -> str:
    """Return one sentence that states the fact, worded by `rng`."""
    words = vars(fact)
    if isinstance(fact, Count):
        words = {"number": NUMBERS[fact.number], "noun": fact.noun}
    elif isinstance(fact, Relation):
        ways = RELATIONS[fact.relation]
        words = words | {"relation": ways[rng.integers(len(ways))]}
    return fact.templates[rng.integers(len(fact.templates))].format(**words)


Namer = Callable[[Thing], Mention]


def _places(scene: Scene, name: Namer) -> list[Fact]:
    return [Place(name(thing), thing.place) for thing in scene.things]


def _two_places(scene: Scene, name: Namer) -> list[Fact]:
    # sizes left out: with them the longest of these would pass 16 tokens
    pairs = [((a, b), (b, a))[a.cell % 2] for a, b in combinations(scene.things, 2)]  # so that no order is the rule
    return [TwoPlaces(Mention(a.color, a.shape), a.place, Mention(b.color, b.shape), b.place) for a, b in pairs]


def _presences(scene: Scene, name: Namer) -> list[Fact]:
    return [Presence(name(thing)) for thing in scene.things]


def _relations(scene: Scene, name: Namer) -> list[Fact]:
    facts: list[Fact] = []
    for a, b in permutations(scene.things, 2):
        if a.row == b.row:
            facts.append(Relation(name(a), "left of" if a.col < b.col else "right of", name(b)))
        elif a.col == b.col:
            facts.append(Relation(name(a), "above" if a.row < b.row else "below", name(b)))
    return facts


def _backgrounds(scene: Scene, name: Namer) -> list[Fact]:
    return [Background(scene.background)]


def _counts(scene: Scene, name: Namer) -> list[Fact]:
    shapes = Counter(thing.shape for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    return [
        Count(len(scene.things)),
        *(Count(number, shape=shape) for shape, number in shapes.items() if number > 1),
        *(Count(number, color=color) for color, number in colors.items() if number > 1),
    ]


_TRUE_FACTS: dict[str, Callable[[Scene, Namer], list[Fact]]] = {
    "place": _places,
    "two_places": _two_places,
    "presence": _presences,
    "relation": _relations,
    "background": _backgrounds,
    "count": _counts,
}
