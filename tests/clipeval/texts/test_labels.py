"""Class names and prompts: sources, checks against the dataset, hashes."""

import json
from pathlib import Path

import pytest

from llip.clipeval.texts.labels import hash_texts, resolve_labels
from llip.clipeval.texts.sources import TextSource
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
    (tmp_path / "words.json").write_text(json.dumps({"sea_lake": "a lake", "river": "a river"}))
    words = resolve_labels(TextSource.parse("words.json", tmp_path), prompts, ["river", "sea lake"], None, None)
    assert words.classnames == ("a river", "a lake")
    with pytest.raises(UserError, match="no name for the dataset's class 'n09'"):
        resolve_labels(TextSource.parse("map.json", tmp_path), prompts, ["n01", "n09"], None, None)
    with pytest.raises(UserError, match=r"gone\.txt is not there"):
        resolve_labels(TextSource.parse("gone.txt", tmp_path), prompts, None, None, None)


@pytest.mark.parametrize(
    ("given", "own", "count", "words"),
    [
        (("cat", "dog"), ["cat", "cow", "dog"], None, "2 class names for a dataset of 3.*class 1: 'dog'.*'cow'"),
        (("cat", "dog", "cow"), ["cat", "dog"], None, "class 2: 'cow', in the dataset nothing"),
        (("dog", "cat", "a cow"), ["cat", "dog", "cow"], None, "class 0 is called .dog., .*name of class 1"),
        (("cat", "dog"), None, 3, "num_classes = 3"),
        (("cat",), None, None, "at least 2"),
    ],
)
def test_names_that_do_not_fit(given: tuple, own: list | None, count: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_labels(names(*given), PROMPTS, own, None, count)


def test_better_names_in_the_datasets_order_are_fine() -> None:
    assert resolve_labels(names("a cat", "a dog"), PROMPTS, ["n01", "n02"], None, 2).classnames == ("a cat", "a dog")


def test_the_datasets_own_names_are_matched_by_name(tmp_path: Path) -> None:
    """In any order, with synonyms, spelled with other cases or underscores."""
    own = ["cat", "hot dog", "cow"]
    assert resolve_labels(names("cow", "Hot_dog", "cat"), PROMPTS, own, None, 3).classnames == ("cat", "Hot_dog", "cow")
    (tmp_path / "labels.json").write_text(json.dumps({"x": [["cow", "ox"], ["cat"], "hot dog"]}))
    labels = resolve_labels(TextSource.parse("labels.json#x", tmp_path), PROMPTS, own, None, 3)
    assert labels.classnames == (("cat",), "hot dog", ("cow", "ox"))


def test_a_name_that_two_classes_share_stays_where_it_is() -> None:
    own = ["crane", "missile", "crane"]
    assert resolve_labels(names("crane", "rocket", "crane"), PROMPTS, own, None, 3).classnames[1] == "rocket"


def test_prompt_without_a_place_for_the_class() -> None:
    with pytest.raises(UserError, match=r"'a photo' has no \{c\}"):
        resolve_labels(names("cat", "dog"), TextSource("list", ("a photo",)), None, None, None)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="defines no prompts"):
        resolve_labels(names("cat", "dog"), TextSource("dataset", "dataset"), None, None, None)
    with pytest.raises(UserError, match=r"'open_clip:imagenett'.*'open_clip:imagenet'"):
        resolve_labels(TextSource.parse("open_clip:imagenett", tmp_path), PROMPTS, None, None, None)


def test_keys_name_the_classes_of_a_dataset_that_has_fewer() -> None:
    keys = names("n01", "n02", "n03")
    labels = resolve_labels(names("cat", "dog", "cow"), PROMPTS, ["n03", "n01"], None, 2, keys)
    assert labels.classnames == ("cow", "cat")
    with pytest.raises(UserError, match="no name for the dataset's class 'n04'"):
        resolve_labels(names("cat", "dog", "cow"), PROMPTS, ["n01", "n04"], None, None, keys)
    with pytest.raises(UserError, match="class_keys has 3 keys, but classnames is 2 names"):
        resolve_labels(names("cat", "dog"), PROMPTS, ["n01"], None, None, keys)
    with pytest.raises(UserError, match="the dataset has none"):
        resolve_labels(names("cat", "dog", "cow"), PROMPTS, None, None, None, keys)


def test_synonyms_have_each_prompt_once(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"x": [["happy", "smiling", "glad"], ["sad", "down"], "angry"]}))
    labels = resolve_labels(TextSource.parse("labels.json#x", tmp_path), PROMPTS, ["happy", "sad", "angry"], None, 3)
    assert labels.classnames == (("happy", "smiling", "glad"), ("sad", "down"), "angry")
    for label, expected in enumerate([("happy", "smiling", "glad"), ("sad", "down"), ("angry",)]):
        assert sorted(labels.prompts_of(label)) == sorted(
            prompt for name in expected for prompt in (f"a photo of {name}", f"{name}.")
        )
    other = resolve_labels(names("happy", "sad", "angry"), PROMPTS, None, None, 3)
    assert hash_texts(labels.classnames) != hash_texts(other.classnames)


def test_hash_depends_on_texts_and_order() -> None:
    assert hash_texts(["a", "b"]) == hash_texts(("a", "b"))
    assert len({hash_texts(["a", "b"]), hash_texts(["b", "a"]), hash_texts(["ab"]), hash_texts(["a"])}) == 4
