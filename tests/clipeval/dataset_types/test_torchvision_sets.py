"""Each torchvision dataset of the shipped catalog, written small in its own layout and read back through the catalog.

Where torchvision compares the MD5 of the real files, that comparison alone is replaced. JPEG names hold PNG bytes, so
that pixels can be compared exactly.
"""

import csv
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from tests.clipeval.fakes import picture, png, write_catalog

Samples = list[tuple[np.ndarray, int]]
WRITERS: dict[str, Callable[[Path], Samples]] = {}


def writer(function: Callable[[Path], Samples]) -> Callable[[Path], Samples]:
    WRITERS[function.__name__] = function
    return function


def pixels(index: int) -> np.ndarray:
    return np.asarray(picture(index))


def random_pixels(index: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture(index)))


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_folders(root: Path, classes: list[str], suffix: str = ".jpg", per_class: int = 2) -> Samples:
    samples = []
    for label, name in enumerate(classes):
        for number in range(per_class):
            save(root / name / f"image_{number + 1:04d}{suffix}", len(samples))
            samples.append((pixels(len(samples)), label))
    return samples


@writer
def food101(root: Path) -> Samples:
    listed = {"apple_pie": ["apple_pie/11"], "waffles": ["waffles/7", "waffles/8"]}
    for index, file in enumerate(file for files in listed.values() for file in files):
        save(root / f"food-101/images/{file}.jpg", index)
    write_text(root / "food-101/meta/test.json", json.dumps(listed))
    return [(pixels(i), label) for i, label in enumerate([0, 1, 1])]


def write_cifar(folder: Path, files: list[str], meta: tuple[str, dict], key: str) -> Samples:
    folder.mkdir(parents=True)
    samples = [(random_pixels(i, 32, 32, 3), label) for i, label in enumerate([3, 0, 7])]
    data = np.stack([image.transpose(2, 0, 1).reshape(-1) for image, _ in samples])
    for file in files:
        (folder / file).write_bytes(pickle.dumps({"data": data, key: [label for _, label in samples]}))
    (folder / meta[0]).write_bytes(pickle.dumps(meta[1]))
    return samples


@writer
def cifar10(root: Path) -> Samples:
    files = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    meta = ("batches.meta", {"label_names": [f"name{n}" for n in range(10)]})
    return write_cifar(root / "cifar-10-batches-py", files, meta, "labels")


@writer
def cifar100(root: Path) -> Samples:
    meta = ("meta", {"fine_label_names": [f"name_{n}" for n in range(100)]})
    return write_cifar(root / "cifar-100-python", ["train", "test"], meta, "fine_labels")


@writer
def stanford_cars(root: Path) -> Samples:
    io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    for index in range(2):
        save(folder / f"cars_test/0000{index}.jpg", index)
    (folder / "devkit").mkdir()
    kinds = [("fname", "O"), ("class", "O")]
    notes = np.array([[("00000.jpg", 2), ("00001.jpg", 1)]], dtype=kinds)
    io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": notes})
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([["Ford A", "Audi B"]], dtype=object)})
    return [(pixels(0), 1), (pixels(1), 0)]


@writer
def fgvc_aircraft(root: Path) -> Samples:
    data = root / "fgvc-aircraft-2013b/data"
    write_text(data / "variants.txt", "707-320", "F/A-18")
    write_text(data / "images_variant_test.txt", "0034309 F/A-18", "0034958 707-320")
    save(data / "images/0034309.jpg", 0)
    save(data / "images/0034958.jpg", 1)
    return [(pixels(0), 1), (pixels(1), 0)]


@writer
def dtd(root: Path) -> Samples:
    write_text(root / "dtd/dtd/labels/test1.txt", "zigzagged/a.jpg", "banded/b.jpg")
    save(root / "dtd/dtd/images/zigzagged/a.jpg", 0)
    save(root / "dtd/dtd/images/banded/b.jpg", 1)
    return [(pixels(0), 1), (pixels(1), 0)]


@writer
def oxford_pets(root: Path) -> Samples:
    write_text(root / "oxford-iiit-pet/annotations/test.txt", "beagle_7 2 2 1", "Abyssinian_201 1 1 1")
    save(root / "oxford-iiit-pet/images/beagle_7.jpg", 0)
    save(root / "oxford-iiit-pet/images/Abyssinian_201.jpg", 1)
    return [(pixels(0), 1), (pixels(1), 0)]


@writer
def flowers102(root: Path) -> Samples:
    io = pytest.importorskip("scipy.io")
    folder = root / "flowers-102"
    for index, number in enumerate((3, 1)):
        save(folder / f"jpg/image_{number:05d}.jpg", index)
    io.savemat(folder / "setid.mat", {"tstid": [[3, 1]], "trnid": [[2]], "valid": [[2]]})
    io.savemat(folder / "imagelabels.mat", {"labels": [[77, 1, 102]]})
    return [(pixels(0), 101), (pixels(1), 76)]


@writer
def mnist(root: Path) -> Samples:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    samples = [(random_pixels(i, 28, 28), label) for i, label in enumerate([7, 2])]
    for part in ("train", "t10k"):
        images = struct.pack(">iiii", 2051, 2, 28, 28) + b"".join(image.tobytes() for image, _ in samples)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 2) + bytes([7, 2]))
    return samples


@writer
def fer2013(root: Path) -> Samples:
    (root / "fer2013").mkdir()
    samples = [(random_pixels(i, 48, 48), label) for i, label in enumerate([6, 0])]
    with (root / "fer2013/fer2013.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        rows.writerow([1, " ".join(["0"] * 48 * 48), "Training"])
        for (image, label), usage in zip(samples, ["PublicTest", "PrivateTest"], strict=True):
            rows.writerow([label, " ".join(map(str, image.flatten())), usage])
    return samples


@writer
def stl10(root: Path) -> Samples:
    folder = root / "stl10_binary"
    folder.mkdir()
    samples = [(random_pixels(i, 96, 96, 3), label) for i, label in enumerate([9, 0])]
    data = b"".join(image.transpose(2, 1, 0).tobytes() for image, _ in samples)  # columns first
    for name in ("train", "test"):
        (folder / f"{name}_X.bin").write_bytes(data)
        (folder / f"{name}_y.bin").write_bytes(bytes([10, 1]))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    write_text(folder / "class_names.txt", *(f"name{n}" for n in range(10)))
    return samples


@writer
def eurosat(root: Path) -> Samples:
    return write_folders(root / "eurosat/2750", ["River", "SeaLake"])


@writer
def gtsrb(root: Path) -> Samples:
    folder = root / "gtsrb"
    for index in range(2):
        file = folder / f"GTSRB/Final_Test/Images/0000{index}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(file)
    write_text(folder / "GT-final_test.csv", "Filename;Width;ClassId", "00000.ppm;8;42", "00001.ppm;8;5")
    return [(pixels(0), 42), (pixels(1), 5)]


@writer
def kitti(root: Path) -> Samples:
    """Distances of cars: none, 7.9, 8, 8.1, 20.5 (and a nearer pedestrian), 3."""
    folder = root / "Kitti/raw/training"
    nearest = [[], [("Car", 7.9)], [("Van", 8.0)], [("Truck", 8.1)], [("Car", 20.5), ("Pedestrian", 2.0)]]
    nearest.append([("Car", 50.0), ("Tram", 1.0), ("Car", 3.0)])
    for index, objects in enumerate(nearest):
        save(folder / f"image_2/{index:06d}.png", index)
        lines = [f"{kind} 0.0 0 0.1 1 2 3 4 1.5 1.6 3.7 1.0 1.7 {z} 0.2" for kind, z in objects]
        write_text(folder / f"label_2/{index:06d}.txt", *lines)
        if not lines:
            (folder / f"label_2/{index:06d}.txt").write_text("")
    return [(pixels(i), label) for i, label in enumerate([3, 0, 0, 1, 2, 0])]


@writer
def country211(root: Path) -> Samples:
    return write_folders(root / "country211/test", ["AD", "ZW"])


@writer
def pcam(root: Path) -> Samples:
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir()
    samples = [(random_pixels(i, 96, 96, 3), label) for i, label in enumerate([1, 0, 1])]
    with h5py.File(root / "pcam/camelyonpatch_level_2_split_test_x.h5", "w") as file:
        file["x"] = np.stack([image for image, _ in samples])
    with h5py.File(root / "pcam/camelyonpatch_level_2_split_test_y.h5", "w") as file:
        file["y"] = np.array([label for _, label in samples], np.uint8).reshape(3, 1, 1, 1)
    return samples


@writer
def clevr_counts(root: Path) -> Samples:
    folder = root / "clevr/CLEVR_v1.0"
    scenes = []
    for index, count in enumerate((3, 10, 4)):
        save(folder / f"images/val/CLEVR_val_{index:06d}.png", index)
        scenes.append({"image_filename": f"CLEVR_val_{index:06d}.png", "objects": [{}] * count})
    write_text(folder / "scenes/CLEVR_val_scenes.json", json.dumps({"scenes": scenes}))
    return [(pixels(0), 0), (pixels(1), 7), (pixels(2), 1)]


@writer
def rendered_sst2(root: Path) -> Samples:
    return write_folders(root / "rendered-sst2/test", ["negative", "positive"], suffix=".png")


def test_every_torchvision_entry_is_here() -> None:
    entries = {name for name, entry in load_catalog().items() if entry.type == "torchvision"}
    assert entries == set(WRITERS)


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take files whose MD5 is not that of the real ones."""
    from torchvision import datasets

    def exists(path: str, md5: str | None = None) -> bool:
        return Path(path).is_file()

    for module in ("cifar", "fer2013", "flowers102", "mnist", "stl10"):
        monkeypatch.setattr(getattr(datasets, module), "check_integrity", exists)


@pytest.mark.parametrize("name", WRITERS)
def test_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_md5: None) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    entry = load_catalog()[name]
    assert not entry.data.exists()
    samples = WRITERS[name](tmp_path)
    assert entry.data.exists()
    source = entry.data.open()
    found = [source.load(index) for index in range(len(source))]
    assert [label for _, label in found] == [label for _, label in samples]
    for (image, _), (expected, _) in zip(found, samples, strict=True):
        assert np.array_equal(np.asarray(image), expected)


def open_entry(folder: Path, **entry: object) -> ImageSource:
    entry = {"type": "torchvision", "path": ".", **entry}
    return load_catalog(write_catalog(folder / "catalog.json", {"task": entry}))["task"].data.open()


def test_the_order_is_that_of_names_and_not_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    samples = kitti(tmp_path)
    listdir = os.listdir
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda path, order=order: order(listdir(path)))
        source = load_catalog()["kitti"].data.open()
        assert [source.load(index)[1] for index in range(6)] == [label for _, label in samples]
        assert [Path(source.name(index)).name for index in range(6)] == [f"{index:06d}.png" for index in range(6)]


def test_names_are_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_md5: None) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    for name, expected in [
        ("food101", ["apple pie", "waffles"]),
        ("fgvc_aircraft", ["707-320", "F/A-18"]),
        ("oxford_pets", ["Abyssinian", "Beagle"]),
    ]:
        WRITERS[name](tmp_path)
        assert load_catalog()[name].data.open().classnames == expected


def test_caltech101_in_torchvisions_layout(tmp_path: Path) -> None:
    pytest.importorskip("scipy.io")
    folder = tmp_path / "caltech101/101_ObjectCategories"
    save(folder / "BACKGROUND_Google/image_0001.jpg", 9)  # no class
    samples = write_folders(folder, ["Faces_easy", "accordion"])
    source = open_entry(tmp_path, dataset="Caltech101")
    assert source.classnames == ["Faces easy", "accordion"]
    for index, (expected, label) in enumerate(samples):
        image, found = source.load(index)
        assert found == label
        assert np.array_equal(np.asarray(image), expected)


def test_sun397_in_torchvisions_layout(tmp_path: Path) -> None:
    write_text(tmp_path / "SUN397/ClassName.txt", "/a/abbey", "/z/zoo/outdoor")
    save(tmp_path / "SUN397/z/zoo/outdoor/sun_b.jpg", 0)
    source = open_entry(tmp_path, dataset="SUN397")
    assert source.classnames == ["abbey", "zoo/outdoor"]
    assert source.load(0)[1] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": {"value": [1, 2]}}, r"label = \{'value': \[1, 2\]\}; expected .*'values'"),
        ({"label": {"values": [1]}}, r"label = .*expected"),
        ({"label": {"closest": {"types": ["Car"]}}}, "'field' is a required property"),
        ({"dataset": "PCAM"}, "PCAM cannot be opened in .*not found"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict, words: str) -> None:
    pytest.importorskip("h5py")
    with pytest.raises(UserError, match=words):
        open_entry(tmp_path, **({"dataset": "EuroSAT"} | changes))


def test_an_image_without_a_class_is_an_error_of_that_image(tmp_path: Path) -> None:
    write_folders(tmp_path / "eurosat/2750", ["A", "B", "C"])
    source = open_entry(tmp_path, dataset="EuroSAT", label={"values": [2, 0]})
    assert source.load(0)[1] == 1
    assert source.load(5)[1] == 0
    with pytest.raises(ValueError, match="value 1 is none of 2, 0"):
        source.load(2)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_md5: None) -> None:
    monkeypatch.setenv("LLIP_DATASETS", str(tmp_path))
    for file in ("setid.mat", "imagelabels.mat"):
        write_text(tmp_path / "flowers-102" / file, "x")
    save(tmp_path / "flowers-102/jpg/image_00001.jpg", 0)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    with pytest.raises(UserError, match=r"cannot be opened .*; install it with `pip install scipy`"):
        load_catalog()["flowers102"].data.open()


def test_images_are_read_as_they_are(tmp_path: Path) -> None:
    write_folders(tmp_path / "eurosat/2750", ["A", "B"])
    (tmp_path / "eurosat/2750/A/image_0001.jpg").write_bytes(b"")
    source = open_entry(tmp_path, dataset="EuroSAT")
    with pytest.raises(OSError, match="cannot identify"):
        source.load(0)
    assert isinstance(source.load(1)[0], Image.Image)
