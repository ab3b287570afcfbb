"""The image transforms of a model: any mode of picture, as training and evaluation read it."""

import numpy as np
import pytest
import torch
from PIL import Image

import llip
from llip.errors import UserError
from llip.open_clip.pixels import to_rgb
from llip.open_clip.transforms import image_transforms


@pytest.fixture(scope="module")
def transforms():
    return image_transforms(32)


def pictures():
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (40, 50), dtype=np.uint16)
    coloured = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    return {"I;16": Image.fromarray(deep), "L": coloured.convert("L"), "P": coloured.quantize(8), "RGB": coloured}


@pytest.mark.parametrize("mode", pictures())
def test_every_mode_is_seen_as_evaluation_sees_it(transforms, mode):
    picture = pictures()[mode]
    assert torch.equal(transforms[1](picture), transforms[1](to_rgb(picture)))


def test_greys_of_16_bits_are_scaled(transforms):
    shallow = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint16)
    expected = transforms[1](Image.fromarray(shallow.astype(np.uint8)))
    torch.testing.assert_close(transforms[1](Image.fromarray(shallow * 257)), expected)


def test_other_inputs_are_refused(transforms, tiny_model):
    picture = pictures()["RGB"]
    for wrong in ([picture], np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), "picture.jpg"):
        for transform in transforms:
            with pytest.raises(UserError, match="expected one PIL image, got"):
                transform(wrong)
    _, train, val = llip.create_model_and_transforms(tiny_model, pool_heads=4)
    assert train(picture).shape == val(picture).shape == (3, 32, 32)
