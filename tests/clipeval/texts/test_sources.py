"""Sources of class names and prompts: files in the SLIP layout, and packages that are read as data."""

import json
import sys
from pathlib import Path

import pytest

from llip.clipeval.texts.sources import TextSource
from llip.errors import UserError


def read(value: str | list[str], base: Path, what: str = "classnames") -> object:
    return TextSource.parse(value, base).read(None, what)


def test_one_set_of_a_file_that_holds_several(tmp_path: Path) -> None:
    """The layout of the SLIP suite: labels.json and templates.json, name -> list; a class may have synonyms."""
    labels = {"pets": ["cat", "dog"], "fer": [["happy", "smiling"], "sad"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "templates.json").write_text(json.dumps({"pets": ["a {}.", "the {}."]}))
    assert read("labels.json#pets", tmp_path) == ["cat", "dog"]
    assert read("labels.json#fer", tmp_path) == [["happy", "smiling"], "sad"]
    assert read("templates.json#pets", tmp_path, "prompts") == ["a {}.", "the {}."]
    with pytest.raises(UserError, match=r"no entry 'pest'.*'pets'"):
        read("labels.json#pest", tmp_path)
    with pytest.raises(UserError, match=r"add #NAME to the file's name, as #pets"):
        read("labels.json", tmp_path)
    with pytest.raises(UserError, match=r"add #NAME .*#pets"):
        read("templates.json", tmp_path, "prompts")


@pytest.mark.parametrize(
    "value", ['{"x": 3}', '{"x": []}', '{"x": ["a", ""]}', '{"x": ["a", []]}', '{"x": [["a", 3]]}']
)
def test_what_is_no_list_of_texts(tmp_path: Path, value: str) -> None:
    (tmp_path / "labels.json").write_text(value)
    with pytest.raises(UserError, match=r"labels\.json, entry 'x', holds .*; expected a list of strings"):
        read("labels.json#x", tmp_path)


def test_prompts_have_no_synonyms_and_a_text_file_has_no_sets(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"x": [["a {}", "the {}"]]}')
    with pytest.raises(UserError, match="expected a list of strings"):
        read("t.json#x", tmp_path, "prompts")
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"has no entry 'x'; expected a \.json"):
        read("t.txt#x", tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="holds list; expected an object of name -> list"):
        read("list.json#x", tmp_path)


def test_a_change_of_the_file_shows(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"x": ["a"], "y": ["a"]}')
    source = TextSource.parse("labels.json#x", tmp_path)
    first = source.content()
    assert TextSource.parse("labels.json#y", tmp_path).content() != first
    (tmp_path / "labels.json").write_text('{"x": ["b"], "y": ["a"]}')
    assert source.content() != first


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages that must not be imported: doing so raises."""
    for package, file in (("clip_benchmark", "datasets/x"), ("timm", "data/_info/x")):
        (tmp_path / package / file).parent.mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_clip_benchmark_is_read_as_data(packages: Path) -> None:
    folder = packages / "clip_benchmark/datasets"
    (folder / "en_classnames.json").write_text(json.dumps({"pets": ["cat", "dog"]}))
    (folder / "en_zeroshot_classification_templates.json").write_text(json.dumps({"pets": ["a {c}."]}))
    assert read("clip_benchmark:pets", packages) == ["cat", "dog"]
    assert read("clip_benchmark:pets", packages, "prompts") == ["a {c}."]
    with pytest.raises(UserError, match=r"clip-benchmark .* has no entry 'pest'.*'pets'"):
        read("clip_benchmark:pest", packages)
    with pytest.raises(UserError, match="has classnames and prompts, but no class_keys"):
        read("clip_benchmark:pets", packages, "class_keys")
    (folder / "en_classnames.json").unlink()
    with pytest.raises(UserError, match=r"clip-benchmark has no datasets/en_classnames\.json"):
        read("clip_benchmark:pets", packages)


def test_timm_is_read_as_data(packages: Path) -> None:
    (packages / "timm/data/_info/some_synsets.txt").write_text("n01\nn02\n")
    assert read("timm:some_synsets", packages, "class_keys") == ["n01", "n02"]
    with pytest.raises(UserError, match="timm:other: the installed package timm has no"):
        read("timm:other", packages, "class_keys")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"clip-benchmark is not installed; .*pip install --no-deps clip-benchmark"):
        read("clip_benchmark:pets", Path())


def test_unknown_sources() -> None:
    with pytest.raises(UserError, match=r"unknown source 'clip_bench:pets' of prompts.*'clip_benchmark:'"):
        read("clip_bench:pets", Path(), "prompts")
    with pytest.raises(UserError, match=r"'open_clip:imagenett'.*'open_clip:imagenet'"):
        read("open_clip:imagenett", Path())


def test_the_real_packages() -> None:
    keys = read("timm:imagenet_synsets", Path(), "class_keys")
    assert (len(keys), keys[0], keys == sorted(keys)) == (1000, "n01440764", True)
    pytest.importorskip("clip_benchmark")
    assert len(read("clip_benchmark:flowers", Path())) == 102
    assert "{c}" in read("clip_benchmark:flowers", Path(), "prompts")[0]
