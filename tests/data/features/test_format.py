"""How cached features are stored: numpy reads the same numbers, int8 loses half a step, damage is a bad sample."""

import io
import json

import numpy as np
import pytest
import torch

from llip.data.captions import BadSample
from llip.data.features.format import FeatureFormat, fits, read_array, tar_bytes, write_features
from tests.helpers import write_tar

CAPTIONS = ["one", "two", "three"]


def sample(dtype, image, text):
    members = write_features("image", image, dtype) | write_features("text", text, dtype)
    return members | {"text.json": json.dumps(CAPTIONS).encode()}


def drawn(seed=0, rows=4, width=6):
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_features_are_read_as_they_were_written(dtype):
    image, text = drawn(), drawn(1, rows=3, width=5)
    image[1] = 0  # a scale of nothing
    form = FeatureFormat(dtype, (4, 6), 5)
    read, captions = form.read(sample(dtype, image, text), ["three", "one", "three"])
    read, captions = form.to_tensor(read.copy()), form.to_tensor(np.stack(captions))
    for got, expected in ((read, image), (captions, text[[2, 0, 2]])):
        if dtype == "int8":
            step = expected.abs().amax(1, keepdim=True) / 127
            assert ((got.double() - expected.double()).abs() <= 0.5 * step + 1e-3 * expected.abs()).all()
        else:
            assert torch.equal(got, expected.to(torch.float16 if dtype == "fp16" else torch.bfloat16))


def test_numpy_and_the_reader_agree():
    for array in (np.arange(12, dtype=np.float16).reshape(3, 4), np.zeros((0, 2), np.int8), np.arange(5.0)):
        file = io.BytesIO()
        np.save(file, array)
        read = read_array(file.getvalue())
        assert read.dtype == array.dtype
        assert (read == np.load(io.BytesIO(file.getvalue()), allow_pickle=False)).all()


def test_numbers_that_a_type_does_not_hold():
    assert fits(torch.tensor([65504.0]), "fp16")
    assert not fits(torch.tensor([65600.0]), "fp16")
    assert fits(torch.tensor([65600.0]), "bf16")
    assert not any(fits(torch.tensor([float("nan")]), dtype) for dtype in ("fp16", "bf16", "int8"))


def damaged(members, **changes):
    return {name: data for name, data in (members | changes).items() if data is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"image.npy": None},
        {"image.npy": b""},
        {"image.npy": b"junk" * 100},
        {"image.npy": write_features("image", drawn(rows=5), "fp16")["image.npy"]},
        {"image.npy": write_features("image", drawn(), "bf16")["image.npy"]},
        {"text.npy": None},
        {"text.json": b"[1"},
        {"text.json": b'["one"]'},
        {"text.npy": write_features("text", drawn(rows=2, width=5), "fp16")["text.npy"]},
    ],
)
def test_damage_is_a_bad_sample(changes):
    members = sample("fp16", drawn(), drawn(1, rows=3, width=5))
    with pytest.raises(BadSample, match="damaged features"):
        FeatureFormat("fp16", (4, 6), 5).read(damaged(members, **changes), ["one"])


def test_pickled_objects_are_refused():
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="numbers"):
        read_array(file.getvalue())


def test_an_unknown_caption_and_an_unusable_sample_say_so():
    form = FeatureFormat("fp16", (4, 6), 5)
    with pytest.raises(BadSample, match="caption is not in the feature cache"):
        form.read(sample("fp16", drawn(), drawn(1, rows=3, width=5)), ["four"])
    with pytest.raises(BadSample, match="truncated image"):
        form.read({"image.error": b"truncated image"}, ["one"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_predicted_sizes_are_those_of_a_tar(dtype, tmp_path):
    form, image, text = FeatureFormat(dtype, (16, 320), 64), drawn(rows=16, width=320), drawn(rows=3, width=64)
    members = sample(dtype, image, text)
    path = write_tar(tmp_path / "a.tar", [members] * 40)
    end = 2 * 512 + 10240  # two empty blocks, and padding to tar's records
    predicted = 40 * (form.image_bytes() + form.text_bytes(3))
    assert predicted <= path.stat().st_size <= predicted + end
    assert tar_bytes(0) == 512
