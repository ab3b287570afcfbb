"""Class names and prompts: sources, checks against the dataset, hashes."""

import json
from pathlib import Path

import pytest

from llip.clipeval.labels import TextSource, hash_texts, resolve_labels
from llip.errors import UserError

PROMPTS = TextSource("list", ("a photo of {c}", "{}."))


def names(*values: str) -> TextSource:
    return TextSource("list", values)


def test_prompts_are_filled_in() -> None:
    labels = resolve_labels(names("{cat}", "dog"), PROMPTS, None, None, 2)
    assert labels.prompts_of(1) == ["a photo of dog", "dog."]
    assert labels.prompts_of(0) == ["a photo of {cat}", "{cat}."]  # a name is never read as a template


def test_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    (tmp_path / "map.json").write_text(json.dumps({"n02": "dog", "n01": "cat", "n03": "cow"}))
    (tmp_path / "prompts.json").write_text(json.dumps(["one {c}"]))
    prompts = TextSource.parse("prompts.json", tmp_path)
    assert resolve_labels(TextSource.parse("names.txt", tmp_path), prompts, None, None, None).classnames == (
        "cat",
        "dog",
    )
    mapped = resolve_labels(TextSource.parse("map.json", tmp_path), prompts, ["n01", "n02"], None, None)
    assert mapped.classnames == ("cat", "dog")
    with pytest.raises(UserError, match="no name for the dataset's class 'n09'"):
        resolve_labels(TextSource.parse("map.json", tmp_path), prompts, ["n01", "n09"], None, None)
    with pytest.raises(UserError, match=r"gone\.txt is not there"):
        resolve_labels(TextSource.parse("gone.txt", tmp_path), prompts, None, None, None)


@pytest.mark.parametrize(
    ("given", "own", "count", "words"),
    [
        (("cat", "dog"), ["cat", "cow", "dog"], None, "2 class names for a dataset of 3.*class 1: 'dog'.*'cow'"),
        (("cat", "dog", "cow"), ["cat", "dog"], None, "class 2: 'cow', in the dataset nothing"),
        (("dog", "cat"), ["cat", "dog"], None, "another order.*class 0: 'dog'"),
        (("cat", "dog"), None, 3, "num_classes = 3"),
        (("cat",), None, None, "at least 2"),
    ],
)
def test_names_that_do_not_fit(given: tuple, own: list | None, count: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_labels(names(*given), PROMPTS, own, None, count)


def test_better_names_in_the_datasets_order_are_fine() -> None:
    assert resolve_labels(names("a cat", "a dog"), PROMPTS, ["n01", "n02"], None, 2).classnames == ("a cat", "a dog")


def test_prompt_without_a_place_for_the_class() -> None:
    with pytest.raises(UserError, match=r"'a photo' has no \{c\}"):
        resolve_labels(names("cat", "dog"), TextSource("list", ("a photo",)), None, None, None)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompts of its own"):
        resolve_labels(names("cat", "dog"), TextSource("dataset", "dataset"), None, None, None)
    with pytest.raises(UserError, match=r"'open_clip:imagenett'.*'open_clip:imagenet'"):
        resolve_labels(TextSource.parse("open_clip:imagenett", tmp_path), PROMPTS, None, None, None)


def test_hash_depends_on_texts_and_order() -> None:
    assert hash_texts(["a", "b"]) == hash_texts(("a", "b"))
    assert len({hash_texts(["a", "b"]), hash_texts(["b", "a"]), hash_texts(["ab"]), hash_texts(["a"])}) == 4
