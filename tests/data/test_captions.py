"""Captions by weight, and caption_keys."""

import json
import random

import pytest

from llip.data.captions import BadSample, choose_caption, parse_caption_keys
from llip.errors import UserError


def draw(sample, keys, count=1):
    sources = parse_caption_keys(keys)
    return [choose_caption(sample, sources, random.Random(i)) for i in range(count)]


def test_captions_by_weight_and_fallback():
    sample = {"txt": b"t", "json": json.dumps({"captions": ["a", "b", ""], "alt": "one string", "n": 3}).encode()}
    assert set(draw(sample, "json.captions", 30)) == {"a", "b"}
    assert draw(sample, "json.alt") == ["one string"]  # one caption, not its characters
    assert draw(sample, "json.missing,txt") == ["t"]
    assert draw(sample, "json.missing:1,txt:0") == ["t"]
    share = draw(sample, "json.captions:0.7,txt:0.3", 500).count("t") / 500
    assert 0.22 < share < 0.38
    with pytest.raises(BadSample, match=r"json\.n is neither"):
        draw(sample, "json.n")
    with pytest.raises(BadSample, match="json is not json"):
        draw({"json": b"{"}, "json.captions")
    with pytest.raises(BadSample, match="no caption"):
        draw({"txt": b" "}, "txt")


@pytest.mark.parametrize("keys", ["", "json", "txt.a", "json.captions:x", "txt:0", "json.a:-1", "txt:inf", "txt:nan"])
def test_bad_caption_keys(keys):
    with pytest.raises(UserError, match="caption_keys"):
        parse_caption_keys(keys)
