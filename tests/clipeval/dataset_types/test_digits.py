"""scikit-learn's digits: the images, the order of the classes, and the message on a machine without the package."""

import importlib.util

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.catalog.opening import labels_of, open_source
from llip.errors import UserError


def test_images_and_classes() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    entry = load_catalog()["sklearn_digits"]
    source = open_source(entry)  # also checks the number of images
    digits = datasets.load_digits()
    assert labels_of(entry, source).classnames == tuple("0123456789")
    for index in (0, 17, 1796):
        image, label = source.load(index)
        levels = np.asarray(image).astype(float) * 16 / 255
        assert np.abs(levels - digits.images[index]).max() < 0.04
        assert label == digits.target[index]
    assert list(source.targets()) == digits.target.tolist()
    # a nearest-mean classifier on the images and labels as read is far above chance: they belong together
    flat = np.stack([np.asarray(source.load(i)[0]).flatten() for i in range(300)]).astype(float)
    labels = np.array(source.targets()[:300])
    means = np.stack([flat[:200][labels[:200] == c].mean(0) for c in range(10)])
    guesses = ((flat[200:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guesses == labels[200:]).mean() > 0.7


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    entry = load_catalog()["sklearn_digits"]
    assert not entry.data.exists()
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_source(entry)
