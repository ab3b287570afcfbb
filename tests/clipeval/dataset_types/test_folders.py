"""Folders of images: which folders are classes, what they are called, and listings of a split."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.catalog.opening import labels_of, open_source
from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from tests.clipeval.fakes import picture, png, write_catalog, write_imagefolder


def save(folder: Path, *files: str) -> None:
    """Write the files; number i is picture(i)."""
    for index, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(png(picture(index)))


def open_entry(folder: Path, **fields: object) -> ImageSource:
    entry = {"type": "imagefolder", "path": "set", **fields}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


def read(source: ImageSource) -> list[tuple[int, int]]:
    """Return (number of the picture, label) of each image."""
    known = {png(picture(i)): i for i in range(8)}
    return [(known[png(image)], label) for image, label in (source.load(i) for i in range(len(source)))]


def test_a_pattern_says_which_folders_are_classes_and_what_they_are_called(tmp_path: Path) -> None:
    save(tmp_path / "set", "002.Sooty_Albatross/a.jpg", "001.Auk/b.jpg", "notes/c.jpg")
    source = open_entry(tmp_path, class_pattern=r"\d+\.(.+)")
    assert source.classnames == ["Auk", "Sooty Albatross"]
    assert read(source) == [(1, 0), (0, 1)]
    assert open_entry(tmp_path, class_pattern="0.*").classnames == ["001.Auk", "002.Sooty Albatross"]
    with pytest.raises(UserError, match="no class folders that match class_pattern 'x'"):
        open_entry(tmp_path, class_pattern="x")
    with pytest.raises(UserError, match=r"class_pattern '\(' is not a regular expression"):
        open_entry(tmp_path, class_pattern="(")


def test_words_joined_like_this(tmp_path: Path) -> None:
    save(tmp_path / "set", "ApplyEyeMakeup/a.jpg", "YoYo/b.jpg")
    assert open_entry(tmp_path, camel_case=True).classnames == ["Apply Eye Makeup", "Yo Yo"]
    assert open_entry(tmp_path).classnames == ["ApplyEyeMakeup", "YoYo"]


def test_numbered_folders_follow_their_values(tmp_path: Path) -> None:
    save(tmp_path / "set", "10/a.jpg", "2/b.jpg", "0/c.jpg")
    assert read(open_entry(tmp_path, numbered=True)) == [(2, 0), (1, 1), (0, 2)]
    assert read(open_entry(tmp_path)) == [(2, 0), (0, 1), (1, 2)]  # sorted as words
    save(tmp_path / "set", "x/a.jpg")
    with pytest.raises(UserError, match=r"folder 'x' in .* is not a number"):
        open_entry(tmp_path, numbered=True)


def test_a_listing_names_the_images_of_a_split(tmp_path: Path) -> None:
    save(tmp_path / "set", "a/abbey/1.jpg", "a/abbey/2.jpg", "z/zoo/outdoor/3.jpg", "b/barn/4.jpg")
    (tmp_path / "list.txt").write_text("/z/zoo/outdoor/3.jpg\n\n/a/abbey/2.jpg\n")
    source = open_entry(tmp_path, listing="list.txt", class_pattern="[a-z]/(.+)")
    assert source.classnames == ["abbey", "zoo outdoor"]
    assert read(source) == [(2, 1), (1, 0)]
    (tmp_path / "list.txt").write_text("a/abbey/9.jpg\na/abbey/1.jpg\n")
    source = open_entry(tmp_path, listing="list.txt")
    with pytest.raises(FileNotFoundError):  # counted and named by whoever reads it
        source.load(0)
    for text, words in [("1.jpg\n", "lists '1.jpg'"), ("../x/1.jpg\n", "lists '../x/1.jpg'"), ("", "lists no class")]:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            open_entry(tmp_path, listing="list.txt")


def test_names_and_a_subset_from_files(tmp_path: Path) -> None:
    save(tmp_path / "set", "air_freshener/a.jpg", "alarm_clock/b.jpg", "zip/c.jpg")
    (tmp_path / "names.json").write_text(json.dumps({"air_freshener": "Air freshener", "alarm_clock": "Alarm"}))
    (tmp_path / "only.json").write_text(json.dumps({"Alarm": "analog clock; digital clock"}))
    assert open_entry(tmp_path, names="names.json").classnames == ["Air freshener", "Alarm"]
    source = open_entry(tmp_path, names="names.json", only="only.json")
    assert source.classnames == ["Alarm"]
    assert read(source) == [(1, 0)]
    (tmp_path / "only.json").write_text(json.dumps(["Alarm", "Axe"]))
    with pytest.raises(UserError, match=r"only.json lists class 'Axe', which .*set lacks"):
        open_entry(tmp_path, names="names.json", only="only.json")
    (tmp_path / "names.json").write_text("[]")
    with pytest.raises(UserError, match=r"names.json holds list; expected an object"):
        open_entry(tmp_path, names="names.json")


def test_a_border_is_cut_off(tmp_path: Path) -> None:
    save(tmp_path / "set", "a/1.png")
    image, _ = open_entry(tmp_path, crop_border=2).load(0)
    assert np.array_equal(np.asarray(image), np.asarray(picture(0))[2:-2, 2:-2])


def test_a_subset_of_imagenets_classes_gets_its_names_by_wordnet_id(tmp_path: Path) -> None:
    """As ImageNet-A, -R and -Sketch: which names the folders have is in the catalog alone."""
    save(tmp_path / "set", "n01443537/a.jpg", "n15075141/b.jpg", "n01440764/c.jpg")
    names = {"classnames": "open_clip:imagenet", "class_keys": "timm:imagenet_synsets", "prompts": ["a {c}"]}
    entry = {"type": "imagefolder", "path": "set", "class_pattern": r"n\d{8}", "num_classes": 3, **names}
    entry = load_catalog(write_catalog(tmp_path / "catalog.json", {"task": entry}))["task"]
    source = open_source(entry)
    assert labels_of(entry, source).classnames == ("tench", "goldfish", "toilet paper")
    assert read(source) == [(2, 0), (0, 1), (1, 2)]
    save(tmp_path / "set", "n99999999/a.jpg")
    with pytest.raises(UserError, match="no name for the dataset's class 'n99999999'"):
        labels_of(entry, open_source(entry))


FOLDERS = {  # entry of the shipped catalog -> files, and what it makes of them
    "imagenet": (
        ["imagenet/val/n01443537/a.JPEG", "imagenet/val/n01440764/b.JPEG"],
        ["n01440764", "n01443537"],
        [1, 0],
    ),
    "imagenet_v2": (["imagenetv2-matched-frequency-format-val/10/a.jpeg"], ["10"], [0]),
    "imagenet_a": (["imagenet-a/n01443537/a.jpg", "imagenet-a/README.txt"], ["n01443537"], [0]),
    "imagenet_r": (["imagenet-r/n01443537/art_0.jpg", "imagenet-r/README.txt"], ["n01443537"], [0]),
    "imagenet_sketch": (["sketch/n01443537/sketch_0.JPEG"], ["n01443537"], [0]),
    "caltech101": (
        [f"caltech101/101_ObjectCategories/{name}/image_0001.jpg" for name in ("accordion", "BACKGROUND_Google")],
        ["BACKGROUND Google", "accordion"],
        [0, 1],
    ),
    "resisc45": (["NWPU-RESISC45/golf_course/golf_course_001.jpg"], ["golf course"], [0]),
    "ucf101": (["ucf101/test/TaiChi/v_TaiChi_g01_c01.jpg"], ["Tai Chi"], [0]),
    "kinetics700": (["kinetics700/val/air drumming/x.jpg"], ["air drumming"], [0]),
    "mit_states": (
        [f"mit_states/release_dataset/images/{name}/a.jpg" for name in ("adj wet", "wet dog", "dry dog")],
        ["dry dog", "wet dog"],
        [1, 0],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_the_shipped_catalog(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    files, classes, labels = FOLDERS[name]
    save(tmp_path, *files)
    source = load_catalog()[name].data.open()
    assert source.classnames == classes
    assert sorted(source.targets()) == sorted(labels)


def test_cub_and_sun_and_objectnet_of_the_shipped_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    save(tmp_path / "CUB_200_2011", "images/001.Auk/a.jpg", "images/002.Sooty_Albatross/b.jpg")
    (tmp_path / "CUB_200_2011/test.txt").write_text("002.Sooty_Albatross/b.jpg\n001.Auk/a.jpg\n")
    source = load_catalog()["cub200"].data.open()
    assert (source.classnames, source.targets()) == (["Auk", "Sooty Albatross"], [1, 0])

    save(tmp_path / "SUN397", "a/abbey/x.jpg", "z/zoo/outdoor/y.jpg")
    (tmp_path / "SUN397/Testing_01.txt").write_text("/z/zoo/outdoor/y.jpg\n/a/abbey/x.jpg\n")
    source = load_catalog()["sun397"].data.open()
    assert (source.classnames, source.targets()) == (["abbey", "zoo outdoor"], [1, 0])

    save(tmp_path / "objectnet-1.0/images", "alarm_clock/a.png", "ashtray/b.png")
    mappings = tmp_path / "objectnet-1.0/mappings"
    mappings.mkdir()
    (mappings / "folder_to_objectnet_label.json").write_text('{"alarm_clock": "Alarm clock", "ashtray": "Ash tray"}')
    (mappings / "objectnet_to_imagenet_1k.json").write_text('{"Alarm clock": "analog clock; digital clock"}')
    source = load_catalog()["objectnet"].data.open()
    assert (source.classnames, source.targets()) == (["Alarm clock"], [0])
    assert source.load(0)[0].size == (picture(0).width - 4, picture(0).height - 4)


def test_symlink_loops_count_each_image_once(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "set", ["ant", "bee"], 3)
    (tmp_path / "set/ant/self").symlink_to(".")
    (tmp_path / "set/ant/up").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set/bee/000.png").rename(tmp_path / "elsewhere/000.png")
    (tmp_path / "set/bee/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/bee/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/bee/nowhere").symlink_to(tmp_path / "gone")
    source = open_entry(tmp_path)
    assert source.targets() == [0, 0, 0, 1, 1, 1]
    assert len({os.path.realpath(source.name(i)) for i in range(6)}) == 6
