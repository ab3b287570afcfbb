"""What a scene is, and how one is drawn at random: no pixels and no words yet.

A scene is a coloured background with two to four things on it, each in another cell of a 2 x 2 grid. No two things
of a scene share both shape and colour, so "the red star" is unambiguous. The things are few and large, so that a small
ViT on two CPU cores learns what the captions describe within minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
"""Shapes that stay apart when small and slightly turned."""

COLORS = {
    "red": (222, 40, 44),
    "yellow": (242, 196, 8),
    "green": (44, 158, 54),
    "blue": (42, 82, 218),
    "purple": (146, 52, 190),
    "black": (28, 28, 34),
}
"""Colours of things, RGB. None starts with a vowel sound: prompts say "a {color} {shape}"."""

BACKGROUNDS = {
    "white": (246, 246, 246),
    "gray": (176, 178, 182),
    "pink": (255, 186, 208),
    "beige": (228, 210, 176),
    "mint": (172, 234, 208),
    "lavender": (206, 192, 246),
    "peach": (255, 206, 170),
    "lime": (206, 240, 130),
}
"""Colours of backgrounds, RGB; none is also the colour of a thing, so a colour word says which of the two is meant."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
"""Names of the cells, row by row."""

GRID = 2  # cells along each side
MIN_THINGS, MAX_THINGS = 2, 4
DIAMETERS = {"large": (25.0, 28.0), "small": (17.0, 19.0)}
"""Smallest and largest diameter by size word, in 64ths of the image; a cell is 32 of them wide."""

MAX_ANGLE = 12
"""Things are turned by at most so many degrees: a square never looks like a diamond."""

KINDS = tuple((shape, color) for color in COLORS for shape in SHAPES)
"""Every (shape, colour) that a thing can have."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `x`, `y` (centre) and `diameter` are fractions of the side, `angle` is in degrees."""

    shape: str
    color: str
    size: str
    cell: int
    x: float
    y: float
    diameter: float
    angle: int

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.cell // GRID

    @property
    def col(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """Name of the cell."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """A background colour and the things on it."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Demand:
    """What an evaluation set fixes in its scenes; None leaves it to chance.

    `kind` is the (shape, colour) of one thing and `cell` where that thing is. `only_of_its_color` keeps every other
    thing off its colour.
    """

    background: str | None = None
    kind: tuple[str, str] | None = None
    cell: int | None = None
    only_of_its_color: bool = False


def sample_scene(rng: np.random.Generator, demand: Demand | None = None) -> Scene:
    """Draw a scene that meets `demand` (by default: any scene)."""
    demand = demand or Demand()
    count = int(rng.integers(MIN_THINGS, MAX_THINGS + 1))
    background = demand.background or tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))]
    cells = rng.permutation(len(PLACES)).tolist()
    if demand.kind is not None:  # the demanded thing comes first, and no other may clash with it
        banned_color = demand.kind[1] if demand.only_of_its_color else None
        others = [kind for kind in kinds if kind != demand.kind and kind[1] != banned_color]
        kinds = [demand.kind, *others]
    if demand.cell is not None:
        cells.remove(demand.cell)
        cells.insert(0, demand.cell)
    noise = rng.random((count, 5)).tolist()  # per thing: size word, diameter, x, y, angle
    things = (_place(kinds[i], cells[i], noise[i]) for i in range(count))
    return Scene(background, tuple(things))


def _place(kind: tuple[str, str], cell: int, noise: Sequence[float]) -> Thing:
    """Return a `Thing` in `cell`; `noise` are uniform random numbers in [0, 1)."""
    (shape, color), (size_u, diameter_u, x_u, y_u, angle_u) = kind, noise
    size = "large" if size_u < 0.5 else "small"
    low, high = DIAMETERS[size]
    diameter = (low + diameter_u * (high - low)) / 64
    reach = min(1 / GRID - diameter, 9 / 64)  # jitter never leaves the cell, nor makes the place doubtful
    x = (cell % GRID + 0.5) / GRID + (x_u - 0.5) * reach
    y = (cell // GRID + 0.5) / GRID + (y_u - 0.5) * reach
    angle = round((2 * angle_u - 1) * MAX_ANGLE)
    return Thing(shape, color, size, cell, round(x, 4), round(y, 4), round(diameter, 4), angle)
