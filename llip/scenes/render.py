"""From a `Scene` to pixels: cached antialiased masks pasted onto a gently shaded background."""

import io
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from llip.scenes.world import BACKGROUNDS, COLORS, Scene

SUPERSAMPLING = 8
ANGLE_STEP = 4  # degrees between cached masks; the eye sees no finer at this size
SHADE = 24.0  # change of brightness across the background, of 255
TINT = 10  # a thing's colour is off the named one by at most so many levels a channel

Draw = Callable[[ImageDraw.ImageDraw, Callable], None]


def render(scene: Scene, rng: np.random.Generator, image_size: int) -> Image.Image:
    """Return the scene as an RGB image of `image_size` x `image_size` pixels; `rng` gives the shading and tints."""
    image = Image.fromarray(_background(BACKGROUNDS[scene.background], rng, image_size))
    named = [COLORS[thing.color] for thing in scene.things]
    tints = rng.integers(-TINT, TINT + 1, (len(named), 3))
    colors = (tints + named).clip(0, 255).tolist()
    for thing, color in zip(scene.things, colors, strict=True):
        diameter = round(thing.diameter * image_size)
        mask = _mask(thing.shape, diameter, ANGLE_STEP * round(thing.angle / ANGLE_STEP))
        corner = (round(thing.x * image_size - diameter / 2), round(thing.y * image_size - diameter / 2))
        image.paste(tuple(color), corner, mask)
    return image


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as PNG: lossless, so that the same scene has the same pixels on every machine."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _background(color: tuple[int, int, int], rng: np.random.Generator, size: int) -> np.ndarray:
    """Return [size, size, 3] uint8: `color` under a linear change of brightness in a random direction."""
    angle = rng.random() * 2 * math.pi
    ramp = np.linspace(-SHADE / 2, SHADE / 2, size, dtype=np.float32)
    light = np.rint(ramp[None, :] * math.cos(angle) + ramp[:, None] * math.sin(angle))  # [size, size]
    return (np.array(color, np.float32) + light[:, :, None]).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=4096)
def _mask(shape: str, diameter: int, angle: int) -> Image.Image:
    """Return the shape's coverage as an 8-bit mask of `diameter` x `diameter` pixels."""
    side = diameter * SUPERSAMPLING
    canvas = Image.new("L", (side, side), 0)

    def at(*points: float) -> list[float]:
        """Map coordinates in [-1, 1] (y down) to the large canvas."""
        return [(p + 1) / 2 * (side - 1) for p in points]

    _DRAW[shape](ImageDraw.Draw(canvas), at)
    return canvas.rotate(angle, Image.Resampling.BICUBIC).resize((diameter, diameter), Image.Resampling.BOX)


def _polygon(*points: float) -> Draw:
    """Return a drawer of the polygon x0, y0, x1, y1, ..."""
    return lambda draw, at: draw.polygon(at(*points), fill=255)


def _disc(draw: ImageDraw.ImageDraw, at: Callable, x: float, y: float, radius: float, fill: int = 255) -> None:
    """Fill a disc."""
    draw.ellipse(at(x - radius, y - radius, x + radius, y + radius), fill=fill)


def _star_points() -> list[float]:
    """Return the ten corners of an upright five-pointed star, flat."""
    corners = [(1.0 if i % 2 == 0 else 0.42, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
    return [c for radius, a in corners for c in (radius * math.cos(a), 0.06 + radius * math.sin(a))]


def _circle(draw: ImageDraw.ImageDraw, at: Callable) -> None:
    _disc(draw, at, 0, 0, 0.88)


def _ring(draw: ImageDraw.ImageDraw, at: Callable) -> None:
    _disc(draw, at, 0, 0, 0.94)
    _disc(draw, at, 0, 0, 0.5, fill=0)


def _moon(draw: ImageDraw.ImageDraw, at: Callable) -> None:
    _disc(draw, at, -0.05, 0, 0.94)
    _disc(draw, at, 0.42, -0.12, 0.74, fill=0)


def _heart(draw: ImageDraw.ImageDraw, at: Callable) -> None:
    _disc(draw, at, -0.44, -0.32, 0.47)
    _disc(draw, at, 0.44, -0.32, 0.47)
    draw.polygon(at(-0.85, -0.1, 0.85, -0.1, 0.0, 0.92), fill=255)
    draw.rectangle(at(-0.44, -0.36, 0.44, -0.05), fill=255)


_DRAW: dict[str, Draw] = {
    "circle": _circle,
    "square": _polygon(-0.76, -0.76, 0.76, -0.76, 0.76, 0.76, -0.76, 0.76),
    "triangle": _polygon(0, -0.88, 0.94, 0.74, -0.94, 0.74),
    "star": _polygon(*_star_points()),
    "heart": _heart,
    "cross": _polygon(
        *(-0.28, -0.92, 0.28, -0.92, 0.28, -0.28, 0.92, -0.28, 0.92, 0.28, 0.28, 0.28),
        *(0.28, 0.92, -0.28, 0.92, -0.28, 0.28, -0.92, 0.28, -0.92, -0.28, -0.28, -0.28),
    ),
    "ring": _ring,
    "moon": _moon,
}
