"""The images and captions to explain: files, or rendered scenes."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from llip.data.captions import BadSample
from llip.data.images import decode_image
from llip.errors import UserError, did_you_mean
from llip.scenes.facts import mixed_captions
from llip.scenes.render import render
from llip.scenes.world import sample_scene

MOST_SCENE_CAPTIONS = 6


def read_image(path: Path) -> Image.Image:
    """Return an image file as RGB, decoded as in training.

    Raises:
        UserError: no such file (with the nearest name beside it), or it cannot be decoded.
    """
    if path.is_dir():
        raise UserError(f"--images {str(path)!r} is a folder; give files, for instance {path!s}/*.jpg")
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"image {str(path)!r} is not there.{did_you_mean(path.name, beside)}")
    try:
        return to_pil_image(decode_image(path.read_bytes()))
    except BadSample as error:
        raise UserError(f"image {str(path)!r} cannot be read: {error.reason}") from error
    except OSError as error:
        raise UserError(f"image {str(path)!r} cannot be read: {error.strerror}") from error


def draw_scenes(count: int, size: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Return `count` scenes of `size` pixels, and captions that are each true of at least one of them."""
    images, captions = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng)
        captions += mixed_captions(scene, max(1, MOST_SCENE_CAPTIONS // count), rng)[0]
        images.append(render(scene, rng, size))
    return images, list(dict.fromkeys(captions))
