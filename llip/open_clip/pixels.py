"""Pictures of any mode as RGB, the same way in training, evaluation and search."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB; 16-bit greys are scaled, where PIL would cut them off at 255.

    Raises:
        ValueError: pixels without a known range (floating point, or integers beyond 16 bits).
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}; expected 8 or 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    return image.convert("RGB")
