"""What the tests of the embedded dataset share: how to read its files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_TASKS = ("scenes_top_left", "scenes_red_shape", "scenes_background")
SIZE = 48  # pixels a side, as the program writes them by default


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """Return a tar's samples: bytes by key and extension."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def pixels(sample: dict[str, bytes]) -> np.ndarray:
    """Return a sample's picture, [H, W, 3] int."""
    image = Image.open(io.BytesIO(sample["png"]))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)
