"""Captions by weight, and caption_keys."""

import itertools
import json
import random

import pytest

from llip.data.captions import BadSample, choose_captions, parse_caption_keys
from llip.errors import UserError


def draw(sample, keys, count=1):
    sources = parse_caption_keys(keys)
    return [choose_captions(sample, sources, 1, random.Random(i))[0] for i in range(count)]


def draw_several(sample, keys, captions, seed=0):
    return choose_captions(sample, parse_caption_keys(keys), captions, random.Random(seed))


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


SEVERAL = {"txt": b"t", "json": json.dumps({"c": ["a", "b", "a", "t"], "d": "e"}).encode()}


@pytest.mark.parametrize("seed", range(20))
def test_several_captions_differ_while_there_are_enough(seed):
    drawn = [draw_several(SEVERAL, "json.c:3,txt:1,json.d:0", count, seed) for count in (1, 2, 3, 7)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(drawn))
    assert drawn[0] == [choose_as_ever(SEVERAL, "json.c:3,txt:1,json.d:0", seed)]
    assert set(drawn[3][:3]) == set(drawn[3][3:6]) == {"a", "b", "t"}  # the source of weight 0 is not needed
    assert draw_several({"json": SEVERAL["json"]}, "txt:1,json.d:0", 3, seed) == ["e", "e", "e"]


def choose_as_ever(sample, keys, seed):
    """One caption: a source by weight, then one of its captions; equal ones count as often as they come."""
    sources, rng = parse_caption_keys(keys), random.Random(seed)
    source = rng.choices(list(sources), [source.weight for source in sources])[0]
    return rng.choice(source.captions(sample))


def test_the_first_of_several_is_drawn_by_weight():
    first = [draw_several(SEVERAL, "json.c:0.7,json.d:0.3", 2, seed)[0] for seed in range(500)]
    assert 0.22 < first.count("e") / 500 < 0.38
    second = {tuple(draw_several(SEVERAL, "json.c:0.7,json.d:0.3", 2, seed)) for seed in range(500)}
    assert second == {(a, b) for a in "abte" for b in "abte" if a != b}


def test_sentences_of_all_captions_are_merged():
    sample = {"txt": b"A b. C d! E", "json": json.dumps({"c": ["F g?  H i.", "J"]}).encode()}
    sources, pool = parse_caption_keys("txt,json.c:0.1"), ["A b.", "C d!", "E", "F g?", "H i.", "J"]
    drawn = [choose_captions(sample, sources, 2, random.Random(seed), 3) for seed in range(400)]
    assert drawn == [choose_captions(sample, sources, 2, random.Random(seed), 3) for seed in range(400)]
    merged = {" ".join(merge) for length in (1, 2, 3) for merge in itertools.permutations(pool, length)}
    found = [caption for captions in drawn for caption in captions]
    assert set(found) <= merged
    lengths = [sum(sentence in caption for sentence in pool) for caption in found]
    assert all(0.27 < lengths.count(length) / 800 < 0.4 for length in (1, 2, 3))
    pairs = [caption for caption, length in zip(found, lengths, strict=True) if length == 2]
    neighbours = {" ".join(pair) for pair in itertools.pairwise(pool)}
    assert 0.5 < sum(pair in neighbours for pair in pairs) / len(pairs) < 0.7  # a half, and 5 of 30 by chance
    assert choose_captions({"txt": b"One."}, sources, 3, random.Random(0), 3) == ["One."] * 3
    with pytest.raises(BadSample, match="no caption"):
        choose_captions({"txt": b" "}, sources, 1, random.Random(0), 3)


@pytest.mark.parametrize("keys", ["", "json", "txt.a", "json.captions:x", "txt:0", "json.a:-1", "txt:inf", "txt:nan"])
def test_bad_caption_keys(keys):
    with pytest.raises(UserError, match="caption_keys"):
        parse_caption_keys(keys)
