"""Indexing and querying a folder: exact scores, what has changed, damage, other models, and the pictures."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

import llip
from llip.errors import UserError
from llip.tools.search.__main__ import main
from llip.tools.search.show import contact_sheet
from llip.tools.search.store import lock, open_index
from tests.helpers import image_bytes
from tests.tools.test_fonts import write_font

QUERY = "a red star on the left"


def write_checkpoint(path, tiny_model, seed=0, **options):
    torch.manual_seed(seed)
    options = {"mixture_tokens": 3, "pool_heads": 2} | options
    model, _, _ = llip.create_model_and_transforms(tiny_model, **options)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    return write_checkpoint(tmp_path / "model.pt", tiny_model)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, two of them below; one damaged; what is no image, or hidden."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for i in range(12):
        (root / ("below" if i >= 10 else ".") / f"{i:02}.PNG").write_bytes(image_bytes(i, size=32))
    (root / "torn.jpg").write_bytes(image_bytes(99, suffix="jpg")[:200])
    (root / "notes.txt").write_text("no image")
    (root / ".hidden" / "x.png").write_bytes(image_bytes(50))
    return root


def index(folder, checkpoint, capsys, *options):
    code = main(["index", str(folder), "--checkpoint", str(checkpoint), "--json", *options])
    printed = capsys.readouterr()
    return json.loads(printed.out) if code == 0 else printed.err


def query(capsys, path, *options, text=QUERY):
    assert main(["query", str(path), text, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["hits"]


def scores_by_hand(checkpoint, folder, text=QUERY):
    """Path -> score, by the dense features."""
    model = llip.load_pretrained(checkpoint)
    with torch.no_grad():
        t = model.encode_text(model.tokenizer([text]))
        result = {}
        for path in sorted(folder.rglob("[!.]*.PNG")):
            h = model.encode_image(model.preprocess_val(Image.open(path))[None])
            result[str(path)] = (model.contextualize(h, t)[0, 0] @ t[0]).item()
    return result


def test_scores_are_the_models_own_and_in_order(folder, checkpoint, capsys):
    report = index(folder, checkpoint, capsys)
    assert (report["new"], report["indexed"]) == (13, 12)
    hits = query(capsys, folder / ".llip_index", "--top", "12")
    expected = scores_by_hand(checkpoint, folder)
    assert {hit["path"] for hit in hits} == set(expected)
    for hit in hits:
        assert hit["score"] == pytest.approx(expected[hit["path"]], abs=1e-5)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert query(capsys, folder / ".llip_index", "--top", "3") == hits[:3]


def test_damaged_images_are_named_and_not_read_again(folder, checkpoint, capsys):
    first = index(folder, checkpoint, capsys)
    assert first["damaged"] == {"torn.jpg": "truncated image"}
    again = index(folder, checkpoint, capsys)
    assert (again["new"], again["changed"], again["deleted"], again["indexed"]) == (0, 0, 0, 12)
    assert again["damaged"] == first["damaged"]
    (folder / "torn.jpg").write_bytes(image_bytes(99, suffix="jpg"))
    mended = index(folder, checkpoint, capsys)
    assert (mended["changed"], mended["indexed"], mended["damaged"]) == (1, 13, {})


def test_only_what_has_changed_is_encoded(folder, checkpoint, capsys, monkeypatch):
    index(folder, checkpoint, capsys)
    encoded = []
    from llip.tools.search import build

    load = build.FolderImages.load
    monkeypatch.setattr(build.FolderImages, "load", lambda self, i: (encoded.append(self.paths[i]), load(self, i))[1])
    (folder / "00.PNG").unlink()
    (folder / "01.PNG").write_bytes(image_bytes(101, size=32))
    os.utime(folder / "01.PNG", ns=(time.time_ns(), time.time_ns() + 10**9))
    (folder / "new.png").write_bytes(image_bytes(102, size=32))
    report = index(folder, checkpoint, capsys)
    assert (report["new"], report["changed"], report["deleted"], report["indexed"]) == (1, 1, 1, 12)
    assert encoded == ["01.PNG", "new.png"]
    scores = {hit["path"]: hit["score"] for hit in query(capsys, folder / ".llip_index", "--exact")}
    (folder / "new.png").rename(folder / "new.PNG")  # as `scores_by_hand` looks for them
    expected = scores_by_hand(checkpoint, folder)
    assert len(scores) == 12
    for path, score in expected.items():
        assert scores[path.replace("new.PNG", "new.png")] == pytest.approx(score, abs=1e-5)


def test_segments_without_images_are_deleted(folder, checkpoint, capsys):
    index(folder, checkpoint, capsys)
    path = folder / ".llip_index"
    for image in folder.rglob("*.PNG"):
        image.unlink()
    (folder / "one.png").write_bytes(image_bytes(1, size=32))
    report = index(folder, checkpoint, capsys)
    assert (report["deleted"], report["indexed"]) == (12, 1)
    assert len(list(path.glob("tokens_*.npy"))) == len(list(path.glob("features_*.npy"))) == 1


def test_interrupted_indexing_is_resumed(folder, checkpoint, capsys, monkeypatch):
    from llip.tools.search import build

    monkeypatch.setattr(build, "SEGMENT", 5)
    load, seen = build.FolderImages.load, []

    def fail_late(self, i):
        seen.append(self.paths[i])
        if len(seen) == 8:
            raise KeyboardInterrupt
        return load(self, i)

    monkeypatch.setattr(build.FolderImages, "load", fail_late)
    assert main(["index", str(folder), "--checkpoint", str(checkpoint)]) == 130
    capsys.readouterr()
    assert len(open_index(folder / ".llip_index").images) == 5
    monkeypatch.setattr(build.FolderImages, "load", load)
    report = index(folder, checkpoint, capsys)
    assert (report["new"], report["indexed"]) == (8, 12)
    hits = query(capsys, folder / ".llip_index")
    expected = scores_by_hand(checkpoint, folder)
    assert {hit["path"]: hit["score"] for hit in hits} == pytest.approx(expected, abs=1e-5)


def test_shortlist_holds_the_best_by_the_coarse_score(folder, checkpoint, capsys):
    index(folder, checkpoint, capsys)
    path = folder / ".llip_index"
    model = llip.load_pretrained(checkpoint)
    with torch.no_grad():
        t = model.encode_text(model.tokenizer([QUERY]))
        coarse = {}
        for image in sorted(folder.rglob("[!.]*.PNG")):
            h = model.encode_image(model.preprocess_val(Image.open(image))[None])
            coarse[str(image)] = (model.pooling.contextualize(h, torch.zeros(1, 16))[0, 0] @ t[0]).item()
    best = sorted(coarse, key=coarse.get, reverse=True)[:4]
    hits = query(capsys, path, "--top", "2", "--shortlist", "4")
    exact = scores_by_hand(checkpoint, folder)
    assert [hit["path"] for hit in hits] == sorted(best, key=exact.get, reverse=True)[:2]


def test_a_pooling_that_computes_otherwise_keeps_its_own_scores(folder, checkpoint, capsys, monkeypatch):
    """The faster way is held against the model: here the model's scores are others."""
    from llip.clipeval.scorer import Scorer

    index(folder, checkpoint, capsys)
    scores = Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, h, t: 0.5 * scores(self, h, t))
    scores = {hit["path"]: hit["score"] for hit in query(capsys, folder / ".llip_index")}
    expected = {path: 0.5 * score for path, score in scores_by_hand(checkpoint, folder).items()}
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_text_free_model_searches_too(folder, tmp_path, tiny_model, capsys):
    checkpoint = write_checkpoint(tmp_path / "mean.pt", tiny_model, pooling="mean")
    index(folder, checkpoint, capsys)
    expected = scores_by_hand(checkpoint, folder)
    hits = query(capsys, folder / ".llip_index", "--shortlist", "1", "--top", "3")  # loses nothing here
    assert [hit["path"] for hit in hits] == sorted(expected, key=expected.get, reverse=True)[:3]


def test_texts_that_attend_to_patches_search_too(folder, tmp_path, tiny_model, capsys):
    path = write_checkpoint(tmp_path / "flair.pt", tiny_model, pooling="flair", pair_tokens="patches")
    index(folder, path, capsys)
    expected = scores_by_hand(path, folder)
    hits = query(capsys, folder / ".llip_index", "--top", "12")
    assert len(hits) == 12
    for hit in hits:
        assert hit["score"] == pytest.approx(expected[hit["path"]], abs=1e-5)


def test_half_precision_takes_half_the_disk(folder, checkpoint, tmp_path, capsys):
    sizes, scores = [], []
    for name, options in (("a", []), ("b", ["--half"])):
        index(folder, checkpoint, capsys, "--out", str(tmp_path / name), *options)
        sizes.append(np.load(tmp_path / name / "tokens_0.npy").nbytes)
        scores.append({hit["path"]: hit["score"] for hit in query(capsys, tmp_path / name)})
    assert sizes[0] == 2 * sizes[1]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
    assert scores[0] != scores[1]


def test_another_model_is_refused(folder, checkpoint, tmp_path, tiny_model, capsys):
    index(folder, checkpoint, capsys)
    other = write_checkpoint(tmp_path / "other.pt", tiny_model, seed=1)
    assert "other weights" in index(folder, other, capsys)
    assert main(["query", str(folder / ".llip_index"), "x", "--checkpoint", str(other)]) == 2
    assert "other weights" in capsys.readouterr().err
    moved = tmp_path / "moved.pt"
    checkpoint.rename(moved)
    assert main(["query", str(folder / ".llip_index"), "x"]) == 2
    assert "--checkpoint" in capsys.readouterr().err
    assert len(query(capsys, folder / ".llip_index", "--checkpoint", str(moved))) == 12


def test_sheet_and_page(folder, checkpoint, tmp_path, capsys):
    index(folder, checkpoint, capsys)
    (folder / "03.PNG").unlink()  # deleted since
    sheet, page = tmp_path / "sheet.png", tmp_path / "page.html"
    text = 'a <b>"red"</b> star & more'
    hits = query(capsys, folder / ".llip_index", "--out", str(sheet), "--html", str(page), text=text)
    assert len(hits) == 12
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[1] > 5 * 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 12
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "below/10.PNG" in html
    assert "http" not in html  # nothing is fetched


def test_a_folder_by_any_spelling(folder, checkpoint, capsys, monkeypatch):
    index(folder, checkpoint, capsys)
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder / "below")
    for spelling in ("..", "../../link", str(folder)):
        report = index(spelling, checkpoint, capsys, "--out", str(folder / ".llip_index"))
        assert (report["new"], report["indexed"]) == (0, 12)


def test_a_moved_folder_is_found_or_asked_for(folder, checkpoint, tmp_path, capsys):
    """An index inside its folder moves with it; one elsewhere needs `--folder`, and is updated by the next `index`."""
    outside = tmp_path / "outside"
    index(folder, checkpoint, capsys)
    index(folder, checkpoint, capsys, "--out", str(outside))
    moved = tmp_path / "moved"
    folder.rename(moved)
    hits = query(capsys, moved / ".llip_index")
    assert {hit["path"] for hit in hits} == set(scores_by_hand(checkpoint, moved))
    assert not any(hit["missing"] for hit in hits)
    assert main(["query", str(outside), QUERY]) == 2
    assert "--folder" in capsys.readouterr().err
    assert query(capsys, outside, "--folder", str(moved)) == hits
    report = index(moved, checkpoint, capsys, "--out", str(outside))
    assert (report["new"], report["changed"], report["deleted"], report["indexed"]) == (0, 0, 0, 12)
    assert query(capsys, outside) == hits


def test_images_that_are_gone_are_reported(folder, checkpoint, tmp_path, capsys):
    index(folder, checkpoint, capsys)
    (folder / "03.PNG").unlink()
    assert main(["query", str(folder / ".llip_index"), QUERY, "--json", "--out", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr()
    missing = [hit["path"] for hit in json.loads(printed.out)["hits"] if hit["missing"]]
    assert missing == [str(folder / "03.PNG")]
    assert "1 of the 12 images are no longer there" in printed.err


def test_an_index_of_an_earlier_version_is_read(folder, checkpoint, capsys):
    index(folder, checkpoint, capsys)
    path = folder / ".llip_index/index.json"
    record = json.loads(path.read_text())
    del record["pretrained"]
    record["folder"] = f"{folder}/below/.."
    path.write_text(json.dumps(record))
    assert index(folder, checkpoint, capsys)["new"] == 0
    assert len(query(capsys, folder / ".llip_index")) == 12


def test_a_plain_open_clip_model(plain_model, folder, capsys, monkeypatch):
    monkeypatch.chdir(plain_model.parent)
    index(folder, plain_model.name, capsys)
    monkeypatch.chdir(folder)  # a relative path is resolved
    model = llip.open_model(plain_model)
    with torch.no_grad():
        t = model.encode_text(model.tokenizer([QUERY]))
        for hit in query(capsys, folder / ".llip_index"):
            h = model.encode_image(model.preprocess_val(Image.open(hit["path"]))[None])
            assert hit["score"] == pytest.approx(model.similarity(h, t).item(), abs=1e-5)


def test_sheet_with_other_scripts_and_16_bit_greys(tmp_path, monkeypatch):
    from llip.tools.search.query import Hit

    font = write_font(tmp_path / "cjk.ttf", "Test CJK", "红")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [font])
    Image.fromarray(np.full((40, 40), 100 * 257, np.uint16)).save(tmp_path / "红.png")
    contact_sheet("红" * 20, [Hit(tmp_path / "红.png", 0.5)], tmp_path, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert (pixels[60:240, 20:200] == 100).all()
    title = pixels[16:36, 16:336].min(axis=2) < 100
    assert title.mean() > 0.5, "the test's glyph is a full square"


def test_thumbnails_stand_where_they_should(tmp_path):
    from llip.tools.search.query import Hit

    for name, color in (("red.png", (250, 0, 0)), ("blue.png", (0, 0, 250))):
        Image.new("RGB", (40, 40), color).save(tmp_path / name)
    hits = [Hit(tmp_path / "red.png", 0.9), Hit(tmp_path / "blue.png", 0.1)]
    contact_sheet("query", hits, tmp_path, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    red, blue = (np.flatnonzero((middle == color).all(axis=1)) for color in ((250, 0, 0), (0, 0, 250)))
    assert len(red) == len(blue) == 200
    assert red.max() < blue.min()


def test_one_writer_at_a_time(tmp_path):
    with lock(tmp_path / "i"), pytest.raises(UserError, match="in use by"), lock(tmp_path / "i"):
        pass
    with lock(tmp_path / "i"):
        pass


def test_mistakes_are_reported(folder, checkpoint, tmp_path, capsys):
    def error(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    assert "is not there" in error("index", tmp_path / "nowhere", "--checkpoint", checkpoint)
    assert "no index" in error("query", tmp_path, "x")
    index(folder, checkpoint, capsys)
    path = folder / ".llip_index"
    assert "query is empty" in error("query", path, "  ")
    assert "--top 0" in error("query", path, "x", "--top", "0")
    assert "cannot be written" in error("query", path, "x", "--out", tmp_path / "no" / "sheet.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "is of the folder" in error("index", elsewhere, "--checkpoint", checkpoint, "--out", path)
    tokens = path / "tokens_0.npy"
    tokens.write_bytes(tokens.read_bytes()[:150])
    assert "missing or damaged" in error("query", path, "x")
    (path / "index.json").write_text("{")
    assert "is damaged" in error("query", path, "x")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_names_that_are_no_text_and_an_image_of_one_row(checkpoint, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [os.fsdecode(b"bad\xff.png"), "new\nline $x$.png", "x" * 200 + ".png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(image_bytes(seed, size=32))
    Image.new("L", (3000, 1)).save(folder / "thin.png")
    command = [sys.executable, "-m", "llip", "search", "query", folder / ".llip_index", "a"]
    assert main(["index", str(folder), "--checkpoint", str(checkpoint)]) == 0
    done = subprocess.run([*command, "--out", tmp_path / "s.png", "--html", tmp_path / "p.html"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"bad\udcff.png" in done.stdout
    assert Image.open(tmp_path / "s.png").width > 420
