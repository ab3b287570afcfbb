"""The embedded dataset: what its captions and labels say is checked against the scenes and the pixels themselves."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llip.scenes.facts import _TRUE_FACTS, Mention, mixed_captions, retrieval_captions
from llip.scenes.render import ANGLE_STEP, _mask
from llip.scenes.shards import CAPTIONS
from llip.scenes.world import BACKGROUNDS, COLORS, MAX_ANGLE, PLACES, SHAPES, sample_scene
from tests.scenes.helpers import CLASS_TASKS, SIZE, pixels, read

RED = COLORS["red"]


# --- an evaluator of captions that shares nothing with the generator but its vocabulary ------------------------------

T = rf"((?:small |large )?(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}))"
P = f"({'|'.join(PLACES)})"
N = "(two|three|four)"
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
    return int(thing["y"] * 2), int(thing["x"] * 2)


def is_at(scene: dict, words: str, place: str) -> bool:
    thing = find(scene, words)
    vertical, horizontal = place.split()
    cell = ["top", "bottom"].index(vertical), ["left", "right"].index(horizontal)
    return thing is not None and grid(thing) == cell


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
    return len(counted) == ["two", "three", "four"].index(number) + 2


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
    assert (kinds["place"] + kinds["two_places"]) / sum(kinds.values()) == pytest.approx(0.58, abs=0.05)


def test_shares_of_the_kinds():
    """A scene's first caption is of each kind as often as documented: nothing has run out yet."""
    drawn = Counter()
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        _, (fact,) = mixed_captions(sample_scene(rng), 1, rng)
        drawn[fact.kind] += 1
    asked = {"place": 0.5, "two_places": 0.15, "relation": 0.1, "presence": 0.1, "background": 0.1, "count": 0.05}
    # no relation where the scene is two things (1 in 3) in opposite corners (1 in 3): another kind is drawn instead
    asked["relation"] *= 8 / 9
    expected = {kind: share / sum(asked.values()) for kind, share in asked.items()}
    assert {kind: number / 3000 for kind, number in drawn.items()} == pytest.approx(expected, abs=0.03)


def test_no_scene_runs_out_of_facts():
    """Every scene has more facts than a training picture has captions, and two things are enough for retrieval."""
    fewest, of_two = 99, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        fewest = min(
            fewest,
            sum(
                len(facts_of(scene, lambda thing: Mention(thing.color, thing.shape)))
                for facts_of in _TRUE_FACTS.values()
            ),
        )
        captions, facts = retrieval_captions(scene, rng)
        assert len(set(captions)) == len(set(facts)) == 3
        of_two += len(scene.things) == 2
    assert of_two > 100
    assert fewest == 7 > CAPTIONS


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
        scene = sample_scene(rng)
        captions = mixed_captions(scene, 6, rng)[0] + retrieval_captions(scene, rng)[0]
        longest = max(longest, *(len(tokenizer.encode(caption)) + 2 for caption in captions))
    assert 12 <= longest <= 16


# --- pixels ----------------------------------------------------------------------------------------------------------


def nearest_color(colors: np.ndarray, palette: dict) -> str:
    """Return the name of the palette's colour nearest to the median of `colors` [N, 3]."""
    names = list(palette)
    return names[np.abs(np.array([palette[n] for n in names]) - np.median(colors, axis=0)).sum(1).argmin()]


def cell_mask(image: np.ndarray, cell: int, color: tuple[int, int, int]) -> np.ndarray:
    """Return where a cell of the picture has `color` rather than the background's, [h, w] bool."""
    half = SIZE // 2
    rows, cols = (slice(max(0, i * half - 1), (i + 1) * half + 1) for i in divmod(cell, 2))
    background = np.median(image.reshape(-1, 3), axis=0)
    to_color, to_background = (np.linalg.norm(image[rows, cols] - c, axis=-1) for c in (color, background))
    return to_color < 0.7 * to_background  # of a pixel at the edge: about 60 % of it are covered


def crop(mask: np.ndarray) -> np.ndarray:
    """Return the part of a mask that its True pixels span, in the corner of a 26 x 26 canvas."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return np.pad(part, [(0, 26 - part.shape[0]), (0, 26 - part.shape[1])])


@pytest.fixture(scope="module")
def stencils() -> tuple[np.ndarray, list[str]]:
    """Every shape at every diameter and angle, [S, 26 * 26] bool, and the shapes' names."""
    angles = range(-MAX_ANGLE, MAX_ANGLE + 1, ANGLE_STEP)
    drawn = [(shape, _mask(shape, d, a)) for shape in SHAPES for d in range(12, 23) for a in angles]
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
        assert image.shape == (SIZE, SIZE, 3)
        corners = np.ones((SIZE, SIZE), bool)
        for thing in scene["things"]:
            x, y, d = (int(thing[name] * SIZE) for name in ("x", "y", "diameter"))
            box = (slice(max(0, y - d // 2 - 1), y + d // 2 + 2), slice(max(0, x - d // 2 - 1), x + d // 2 + 2))
            corners[box] = False
            mask = cell_mask(image, PLACES.index(thing["place"]), COLORS[thing["color"]])
            assert 0.15 * d * d < mask.sum() < d * d, thing
            shapes_right.append(recognise(mask, stencils) == thing["shape"])
            assert (thing["size"] == "large") == (d >= 16)
        assert nearest_color(image[corners], BACKGROUNDS) == scene["background"]
    assert np.mean(shapes_right) > 0.98


def test_scene_has_distinct_things_in_distinct_cells():
    numbers = set()
    for seed in range(300):
        things = sample_scene(np.random.default_rng(seed)).things
        numbers.add(len(things))
        assert len({thing.cell for thing in things}) == len({(t.shape, t.color) for t in things}) == len(things)
        for thing in things:
            row, col = divmod(thing.cell, 2)
            off_center = max(abs(thing.x - (0.25 + 0.5 * col)), abs(thing.y - (0.25 + 0.5 * row)))
            assert off_center + thing.diameter / 2 <= 0.2501, "nothing leaves its cell (numbers have four decimals)"
    assert numbers == {2, 3, 4}


# --- evaluation sets -------------------------------------------------------------------------------------------------


def labelled(scenes: Path, task: str) -> list[tuple[np.ndarray, str]]:
    """Return the pictures of a classification set and the names of their classes."""
    classes = (scenes / task / "classnames.txt").read_text().splitlines()
    samples = read(scenes / task / "test" / "0.tar").values()
    return [(pixels(sample), classes[int(sample["cls"].decode("ascii"))]) for sample in samples]


def test_top_left_labels(scenes, stencils):
    right = []
    for image, name in labelled(scenes, "scenes_top_left"):
        color, shape = name.split()
        mask = cell_mask(image, 0, COLORS[color])
        assert mask.sum() > 15, name
        right.append(recognise(mask, stencils) == shape)
    assert np.mean(right) > 0.98


def test_red_shape_labels(scenes, stencils):
    right = []
    for image, shape in labelled(scenes, "scenes_red_shape"):
        is_red = np.abs(image - RED).max(-1) < 25
        reds = [is_red[r : r + 23, c : c + 23].sum() for r in (0, 25) for c in (0, 25)]
        assert sorted(reds)[-2] <= 4 < 12 < max(reds), "exactly one cell has a red thing in it"
        right.append(recognise(cell_mask(image, int(np.argmax(reds)), RED), stencils) == shape)
    assert np.mean(right) > 0.98


def test_background_labels(scenes):
    for image, name in labelled(scenes, "scenes_background"):
        palette = {**BACKGROUNDS, **{f"thing {color}": rgb for color, rgb in COLORS.items()}}
        assert nearest_color(image.reshape(-1, 3), palette) == name


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
        assert len(set(records[-1]["captions"])) == 3
        assert all(is_true(caption, records[-1]["scene"]) for caption in records[-1]["captions"])
        assert [parse(caption)[0] for caption in records[-1]["captions"]] == ["place", "place", "two_places"]
        assert all(re.search("small|large", caption) for caption in records[-1]["captions"][:2])
    true_of = np.array([[sum(is_true(c, o["scene"]) for o in records) for c in r["captions"]] for r in records])
    assert np.mean(true_of[:, 2] == 1) > 0.97, "where two things are is true of its own picture alone"
    # one of 2 to 4 things with its size: true of its own picture, and of another in 3 of (48 kinds, 2 sizes, 4 places)
    assert np.mean(true_of[:, :2]) == pytest.approx(1 + 95 * 3 / (48 * 2 * 4), abs=0.15)
