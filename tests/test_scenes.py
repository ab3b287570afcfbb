"""The embedded dataset: what its captions and labels say is checked against the scenes and the pixels themselves."""

import hashlib
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llip.errors import UserError
from llip.scenes import contact_sheet, ensure_scenes, shards, write_scenes
from llip.scenes.__main__ import main
from llip.scenes.facts import mixed_captions
from llip.scenes.render import ANGLE_STEP, _mask
from llip.scenes.world import BACKGROUNDS, COLORS, KINDS, MAX_ANGLE, PLACES, SHAPES, sample_scene

CLASS_TASKS = ("scenes_center", "scenes_red_shape", "scenes_background")
RED = COLORS["red"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A small dataset, made once."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=150, test=96, seed=0, image_size=64)


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """Return a tar's samples: bytes by key and extension."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def pixels(sample: dict[str, bytes]) -> np.ndarray:
    """Return a sample's picture, [H, W, 3] int."""
    image = Image.open(io.BytesIO(sample["png"]))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def digests(root: Path) -> dict[str, str]:
    """Return a digest of every file under `root`."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- an evaluator of captions that shares nothing with the generator but its vocabulary ------------------------------

T = rf"((?:small |large )?(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}))"
P = f"({'|'.join(PLACES)})"
N = "(two|three|four|five|six)"
R = "(?:is )?(?:to the )?(left of|right of|above|over|below|under)"
PATTERNS = [
    ("place", f"(?:there is )?a {T} in the {P}", (0, 1)),
    ("place", f"in the {P}, a {T}", (1, 0)),
    ("place", f"the {P} shows a {T}", (1, 0)),
    ("place", f"{P}: {T}", (1, 0)),
    ("two_places", f"{T} in the {P}, {T} in the {P}", (0, 1, 2, 3)),
    ("two_places", f"a {T} {P}, a {T} {P}", (0, 1, 2, 3)),
    ("two_places", f"{P}: a {T}, {P}: a {T}", (1, 0, 3, 2)),
    ("presence", f"(?:there is |a picture with |one of the shapes is )?a {T}", (0,)),
    ("relation", f"(?:a|the) {T} {R} (?:a|the) {T}", (0, 1, 2)),
    ("background", r"(?:shapes on |a picture with )?a (\w+) background", (0,)),
    ("background", r"the background is (\w+)", (0,)),
    ("count", rf"(?:a picture with |there are )?{N} (?:(\w+) )?(\w+)", (0, 1, 2)),
]


def parse(caption: str) -> tuple[str, list[str]]:
    """Return a caption's kind and arguments."""
    found = [(k, [m[i + 1] for i in order]) for k, p, order in PATTERNS if (m := re.fullmatch(p, caption))]
    assert len(found) == 1, f"{caption!r} is not one clear sentence: {found}"
    return found[0]


def find(scene: dict, words: str) -> dict | None:
    """Return the thing that `words` ("small red star") name, None where there is none."""
    *size, color, shape = words.split()
    for thing in scene["things"]:
        if (thing["color"], thing["shape"]) == (color, shape) and size in ([], [thing["size"]]):
            return thing
    return None


def grid(thing: dict) -> tuple[int, int]:
    """Return the row and column that a thing's centre falls in."""
    return int(thing["y"] * 3), int(thing["x"] * 3)


def is_at(scene: dict, words: str, place: str) -> bool:
    thing = find(scene, words)
    row, col = (1, 1) if place == "center" else (-1, -1)
    if place != "center":
        row, col = (
            ["top", "middle", "bottom"].index(place.split()[0]),
            ["left", "middle", "right"].index(place.split()[1]),
        )
    return thing is not None and grid(thing) == (row, col)


def is_related(scene: dict, first: str, relation: str, second: str) -> bool:
    a, b = find(scene, first), find(scene, second)
    if a is None or b is None:
        return False
    (a_row, a_col), (b_row, b_col) = grid(a), grid(b)
    if relation in ("left of", "right of"):
        return a_row == b_row and (a_col < b_col if relation == "left of" else a_col > b_col)
    return a_col == b_col and (a_row < b_row if relation in ("above", "over") else a_row > b_row)


def is_count(scene: dict, number: str, color: str | None, plural: str) -> bool:
    shape = "cross" if plural == "crosses" else plural[:-1]
    counted = [t for t in scene["things"] if color in (None, t["color"]) and shape in ("shape", t["shape"])]
    return len(counted) == ["two", "three", "four", "five", "six"].index(number) + 2


def is_true(caption: str, scene: dict) -> bool:
    """Tell whether a caption is true of a scene (its json)."""
    kind, words = parse(caption)
    if kind in ("place", "two_places"):
        return all(is_at(scene, words[i], words[i + 1]) for i in range(0, len(words), 2))
    if kind == "presence":
        return find(scene, words[0]) is not None
    if kind == "relation":
        return is_related(scene, *words)
    return scene["background"] == words[0] if kind == "background" else is_count(scene, *words)


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_true_different_and_match_their_facts(scenes):
    kinds = Counter()
    for sample in read(scenes / "train-00000.tar").values():
        record = json.loads(sample["json"])
        assert len(set(record["captions"])) == 6
        assert sample["txt"].decode() == record["captions"][0]
        for caption, fact in zip(record["captions"], record["facts"], strict=True):
            assert is_true(caption, record["scene"]), (caption, record["scene"])
            assert parse(caption)[0] == fact["kind"]
            kinds[fact["kind"]] += 1
    assert set(kinds) == {"place", "two_places", "presence", "relation", "background", "count"}
    assert (kinds["place"] + kinds["two_places"]) / sum(kinds.values()) == pytest.approx(0.62, abs=0.05)


def test_captions_tell_one_picture_from_another(scenes):
    """A caption of one scene is false of most others: the evaluator above can say no, and the task is no guess."""
    records = [json.loads(sample["json"]) for sample in read(scenes / "train-00000.tar").values()]
    captions = [(i, caption) for i, record in enumerate(records) for caption in record["captions"]]
    wrong = [is_true(caption, records[(i + 1) % len(records)]["scene"]) for i, caption in captions]
    assert np.mean(wrong) < 0.1


def test_captions_fit_in_sixteen_tokens():
    # the module's file alone: the package around it takes many seconds to import
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.SimpleTokenizer()
    longest = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        captions, _ = mixed_captions(sample_scene(rng), 6, rng)
        longest = max(longest, *(len(tokenizer.encode(caption)) + 2 for caption in captions))
    assert 12 <= longest <= 16


# --- pixels ----------------------------------------------------------------------------------------------------------


def nearest_color(colors: np.ndarray, palette: dict) -> str:
    """Return the name of the palette's colour nearest to the median of `colors` [N, 3]."""
    names = list(palette)
    return names[np.abs(np.array([palette[n] for n in names]) - np.median(colors, axis=0)).sum(1).argmin()]


def cell_mask(image: np.ndarray, cell: int, color: tuple[int, int, int]) -> np.ndarray:
    """Return where a cell of the picture has `color` rather than the background's, [h, w] bool."""
    rows, cols = (slice(max(0, round(i * 64 / 3) - 1), round((i + 1) * 64 / 3) + 1) for i in divmod(cell, 3))
    background = np.median(image.reshape(-1, 3), axis=0)
    to_color, to_background = (np.linalg.norm(image[rows, cols] - c, axis=-1) for c in (color, background))
    return to_color < 0.7 * to_background  # of a pixel at the edge: about 60 % of it are covered


def crop(mask: np.ndarray) -> np.ndarray:
    """Return the part of a mask that its True pixels span, in the corner of a 24 x 24 canvas."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return np.pad(part, [(0, 24 - part.shape[0]), (0, 24 - part.shape[1])])


@pytest.fixture(scope="module")
def stencils() -> tuple[np.ndarray, list[str]]:
    """Every shape at every diameter and angle, [S, 24 * 24] bool, and the shapes' names."""
    angles = range(-MAX_ANGLE, MAX_ANGLE + 1, ANGLE_STEP)
    drawn = [(shape, _mask(shape, d, a)) for shape in SHAPES for d in range(11, 20) for a in angles]
    return np.stack([crop(np.asarray(mask) > 150).ravel() for _, mask in drawn]), [shape for shape, _ in drawn]


def recognise(mask: np.ndarray, stencils: tuple[np.ndarray, list[str]]) -> str:
    """Return the shape whose stencil overlaps the mask best (intersection over union)."""
    masks, names = stencils
    seen = crop(mask).ravel()
    return names[((masks & seen).sum(1) / (masks | seen).sum(1)).argmax()]


def test_pictures_show_what_the_json_says(scenes, stencils):
    shapes_right = []
    for sample in read(scenes / "train-00000.tar").values():
        image, scene = pixels(sample), json.loads(sample["json"])["scene"]
        assert image.shape == (64, 64, 3)
        corners = np.ones((64, 64), bool)
        for thing in scene["things"]:
            x, y, d = (int(thing[name] * 64) for name in ("x", "y", "diameter"))
            box = (slice(max(0, y - d // 2 - 1), y + d // 2 + 2), slice(max(0, x - d // 2 - 1), x + d // 2 + 2))
            corners[box] = False
            mask = cell_mask(image, PLACES.index(thing["place"]), COLORS[thing["color"]])
            assert 0.15 * d * d < mask.sum() < d * d, thing
            shapes_right.append(recognise(mask, stencils) == thing["shape"])
            assert (thing["size"] == "large") == (d >= 15)
        assert nearest_color(image[corners], BACKGROUNDS) == scene["background"]
    assert np.mean(shapes_right) > 0.98


def test_scene_has_distinct_things_in_distinct_cells():
    for seed in range(300):
        things = sample_scene(np.random.default_rng(seed)).things
        assert 4 <= len(things) <= 6
        assert len({thing.cell for thing in things}) == len({(t.shape, t.color) for t in things}) == len(things)


# --- evaluation sets -------------------------------------------------------------------------------------------------


def labelled(scenes: Path, task: str) -> list[tuple[np.ndarray, str]]:
    """Return the pictures of a classification set and the names of their classes."""
    classes = (scenes / task / "classnames.txt").read_text().splitlines()
    samples = read(scenes / task / "test" / "0.tar").values()
    return [(pixels(sample), classes[int(sample["cls"].decode("ascii"))]) for sample in samples]


def test_center_labels(scenes, stencils):
    right = []
    for image, name in labelled(scenes, "scenes_center"):
        color, shape = name.split()
        mask = cell_mask(image, 4, COLORS[color])
        assert mask.sum() > 15, name
        right.append(recognise(mask, stencils) == shape)
    assert np.mean(right) > 0.98


def test_red_shape_labels(scenes, stencils):
    right = []
    for image, shape in labelled(scenes, "scenes_red_shape"):
        is_red = np.abs(image - RED).max(-1) < 25
        reds = [is_red[r : r + 21, c : c + 21].sum() for r in (0, 22, 43) for c in (0, 22, 43)]
        assert sorted(reds)[-2] <= 4 < 12 < max(reds), "exactly one cell has a red thing in it"
        right.append(recognise(cell_mask(image, int(np.argmax(reds)), RED), stencils) == shape)
    assert np.mean(right) > 0.98


def test_background_labels(scenes):
    for image, name in labelled(scenes, "scenes_background"):
        palette = {**BACKGROUNDS, **{f"thing {color}": rgb for color, rgb in COLORS.items()}}
        assert nearest_color(image.reshape(-1, 3), palette) == name


def test_evaluation_layout(scenes):
    sizes = {"scenes_center": 96, "scenes_red_shape": 12, "scenes_background": 8}
    for task in CLASS_TASKS:
        names = (scenes / task / "classnames.txt").read_text().splitlines()
        assert len(set(names)) == sizes[task]
        templates = (scenes / task / "zeroshot_classification_templates.txt").read_text().splitlines()
        assert len(templates) >= 4
        assert all(template.count("{c}") == 1 for template in templates)
        assert int((scenes / task / "test" / "nshards.txt").read_text()) == 1
        samples = read(scenes / task / "test" / "0.tar")
        assert len(samples) == 96
        assert all(set(sample) == {"png", "cls"} for sample in samples.values())
        counts = Counter(int(sample["cls"]) for sample in samples.values())
        assert set(counts) == set(range(sizes[task])), "every class is there"
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(KINDS) == 96
    manifest = json.loads((scenes / "scenes.json").read_text())
    assert manifest["arguments"] == {"train": 150, "test": 96, "seed": 0, "image_size": 64}
    assert manifest["train"] == {"samples": 150, "shards": 1, "pattern": "train-{00000..00000}.tar"}
    assert manifest["tasks"]["scenes_center"] == {"samples": 96, "classes": 96}


def test_prompts_are_phrasings_of_training_captions(scenes):
    for task in CLASS_TASKS:
        name = (scenes / task / "classnames.txt").read_text().splitlines()[0]
        for template in (scenes / task / "zeroshot_classification_templates.txt").read_text().splitlines():
            parse(template.replace("{c}", name))


def test_retrieval_captions(scenes):
    folder = scenes / "scenes_retrieval"
    assert (folder / "dataset_type.txt").read_text() == "retrieval\n"
    records = []
    for sample in read(folder / "test" / "0.tar").values():
        assert set(sample) == {"png", "json", "txt"}
        records.append(json.loads(sample["json"]))
        assert sample["txt"].decode().splitlines() == records[-1]["captions"]
        assert len(set(records[-1]["captions"])) == 5
        assert all(is_true(caption, records[-1]["scene"]) for caption in records[-1]["captions"])
        assert {parse(caption)[0] for caption in records[-1]["captions"]} == {"place", "two_places", "relation"}
    true_of = [sum(is_true(c, other["scene"]) for other in records) for r in records for c in r["captions"]]
    assert np.mean(np.array(true_of) == 1) > 0.9, "a caption is true of its own picture alone"


# --- files -----------------------------------------------------------------------------------------------------------


def test_same_arguments_same_bytes(tmp_path, scenes):
    again = write_scenes(tmp_path / "again", 150, 96, 0, 64)
    assert digests(again) == digests(scenes)
    other = digests(write_scenes(tmp_path / "other", 150, 96, 1, 64))
    tars = [name for name in other if name.endswith(".tar")]
    assert all(other[name] != digests(scenes)[name] for name in tars)


def test_a_scene_does_not_depend_on_the_number_of_scenes(tmp_path, scenes):
    few = write_scenes(tmp_path / "few", train=5, test=7, seed=0, image_size=64)
    for name in ("train-00000.tar", *(f"{task}/test/0.tar" for task in (*CLASS_TASKS, "scenes_retrieval"))):
        shorter, longer = read(few / name), read(scenes / name)
        assert shorter == {key: longer[key] for key in shorter}


def test_no_picture_is_in_two_sets(scenes):
    pictures = [sample["png"] for path in scenes.rglob("*.tar") for sample in read(path).values()]
    assert len(pictures) == 150 + 4 * 96
    assert len(set(pictures)) == len(pictures)


def test_shards_split_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TRAIN_SHARD_SIZE", 4)
    monkeypatch.setattr(shards, "TEST_SHARD_SIZE", 2)
    out = write_scenes(tmp_path / "{braces}", train=10, test=3, seed=0, image_size=32)
    parts = [read(path) for path in sorted(out.glob("train-*.tar"))]
    assert [list(part) for part in parts] == [[f"{i:06d}" for i in r] for r in (range(4), range(4, 8), range(8, 10))]
    assert json.loads((out / "scenes.json").read_text())["train"]["pattern"] == "train-{00000..00002}.tar"
    assert (out / "scenes_center" / "test" / "nshards.txt").read_text() == "2\n"
    assert len(read(out / "scenes_center" / "test" / "1.tar")) == 1
    assert pixels(parts[0]["000000"]).shape == (32, 32, 3)


def test_ensure_is_idempotent_and_refuses_other_content(tmp_path):
    out = tmp_path / "new" / "scenes"
    assert ensure_scenes(out, train=3, test=2, seed=0, image_size=32) == out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ensure_scenes(out, train=3, test=2, seed=0, image_size=32) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UserError, match="seed=0, not 1") as error:
        ensure_scenes(out, train=3, test=2, seed=1, image_size=32)
    assert str(out) in str(error.value)
    with pytest.raises(UserError, match="not empty"):
        write_scenes(out, 3, 2, 0, 32)
    (out / "scenes.json").write_text((out / "scenes.json").read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(UserError, match="generator version 0"):
        ensure_scenes(out, train=3, test=2, seed=0, image_size=32)
    (out / "scenes.json").write_text("[]")
    with pytest.raises(UserError, match="no folder of scenes"):
        ensure_scenes(out, train=3, test=2, seed=0, image_size=32)
    taken = tmp_path / "file"
    taken.write_text("mine")
    with pytest.raises(UserError, match="no folder of scenes"):
        ensure_scenes(taken, train=3, test=2, seed=0, image_size=32)
    assert taken.read_text() == "mine"


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_class_sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 5, 2, 0, 32)
    assert list(tmp_path.iterdir()) == []


def test_terminated_program_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "llip.scenes", "--out", str(tmp_path / "scenes"), "--train", "1000000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".scenes.*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_do_no_harm(tmp_path, scenes):
    command = [sys.executable, "-m", "llip.scenes", "--out", str(tmp_path / "scenes"), "--train", "150", "--test", "96"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert digests(tmp_path / "scenes") == digests(scenes)


def test_losing_a_race_is_no_error(tmp_path, monkeypatch):
    """Another process puts its folder in place just before ours is renamed."""
    out, write_all = tmp_path / "scenes", shards._write_all

    def slower(root, args):
        write_all(root, args)
        write_all(out, args)

    out.mkdir()
    monkeypatch.setattr(shards, "_write_all", slower)
    assert ensure_scenes(out, train=3, test=2, seed=0, image_size=32) == out
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize(
    "wrong",
    [{"train": 0}, {"train": 1.5}, {"test": 0}, {"test": True}, {"seed": -1}, {"image_size": 8}, {"image_size": 4096}],
)
def test_bad_arguments(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name} must be a whole number .* got {value!r}"):
        ensure_scenes(tmp_path / "scenes", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        ensure_scenes(tmp_path / "file" / "scenes", train=3, test=2, image_size=32)


# --- the program -----------------------------------------------------------------------------------------------------


def test_program_writes_sheet_and_reports(tmp_path, capsys):
    out, sheet = tmp_path / "scenes", tmp_path / "sheet.png"
    arguments = ["--out", str(out), "--train", "10", "--test", "2", "--sheet", str(sheet), "--rows", "2", "--cols", "3"]
    assert main(arguments) == 0
    assert "10 training scenes" in capsys.readouterr().out
    drawn = np.asarray(Image.open(sheet)).astype(int)
    scene = next(iter(read(out / "train-00000.tar").values()))
    corner = Image.open(io.BytesIO(scene["png"])).resize((176, 176), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(drawn[18 : 18 + 176, 18 : 18 + 176], np.asarray(corner))
    assert (drawn[18 + 176 + 6 : 18 + 176 + 40, 18 : 18 + 176] < 100).any(), "there is text under the scene"
    assert main([*arguments, "--seed", "3"]) == 2
    assert "seed=0, not 3" in capsys.readouterr().err


def test_sheet_errors(tmp_path, scenes):
    with pytest.raises(UserError, match="holds 150 training scenes"):
        contact_sheet(scenes, tmp_path / "sheet.png", rows=20, cols=20)
    with pytest.raises(UserError, match="at least one row"):
        contact_sheet(scenes, tmp_path / "sheet.png", rows=0, cols=2)
    with pytest.raises(UserError, match="cannot write the sheet"):
        contact_sheet(scenes, tmp_path / "nowhere" / "sheet.png", rows=1, cols=1)


def test_program_imports_no_torch():
    code = (
        "import sys, llip.scenes.__main__; print([m for m in ('torch', 'open_clip', 'webdataset') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
