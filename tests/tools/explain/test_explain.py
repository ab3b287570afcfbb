"""The program on a tiny checkpoint: numbers of the model itself, the figure, and what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

import llip
from llip.tools.explain.__main__ import main
from llip.tools.explain.explanation import effective_tokens, tokens_that_matter
from llip.tools.explain.inputs import draw_scenes
from llip.tools.export.__main__ import main as export
from tests.helpers import image_bytes
from tests.tools.test_fonts import write_font


def write_checkpoint(folder, tiny_model, **options):
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, pool_heads=2, **options)
    path = folder / "checkpoint.pt"
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    return write_checkpoint(tmp_path, tiny_model, mixture_tokens=3)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        path.write_bytes(image_bytes(seed, size=32))
    return [str(path) for path in paths]


def test_json_holds_the_numbers_of_the_model(checkpoint, images, capsys):
    captions = ["a red star", "two blue rings"]
    assert main([str(checkpoint), "--images", *images, "--captions", *captions, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = llip.load_pretrained(checkpoint)
    with torch.no_grad():
        h = model.encode_image(torch.stack([model.preprocess_val(Image.open(path)) for path in images]))
        t = model.encode_text(model.tokenizer(captions))
        z = model.contextualize(h, t)
        weights = model.mixture_weights(h, t)
    for i, image in enumerate(record["images"]):
        np.testing.assert_allclose(image["scores"], (z[i] * t).sum(-1), atol=2e-5)
        np.testing.assert_allclose(image["weights_by_head"], weights[i], atol=2e-5)
        np.testing.assert_allclose(image["weights"], weights[i].mean(dim=1), atol=2e-5)
        assert sorted(image["tokens"]) == [0, 1, 2]
        token_maps = np.array(image["token_maps"])[np.argsort(image["tokens"])]
        mixed = np.einsum("tk,khw->thw", np.array(image["weights"]), token_maps)
        np.testing.assert_allclose(image["caption_maps"], mixed, atol=1e-4)
    assert record["notes"] == []


@pytest.mark.slow
def test_figure_is_written_and_repeats(checkpoint, images, tmp_path, capsys):
    figures = [tmp_path / "a.png", tmp_path / "b.png"]
    for figure in figures:
        command = [str(checkpoint), "--images", *images[:1], "--captions", "a", "b", "--attention", "rollout"]
        assert main([*command, "--tokens", "2", "--out", str(figure)]) == 0
    assert figures[0].read_bytes() == figures[1].read_bytes()
    pixels = np.asarray(Image.open(figures[0]).convert("RGB"))
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert "one.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "note"),
    [({"pooling": "mean", "mixture_tokens": 3}, "ignores the caption"), ({"mixture_tokens": 1}, "One mixture token")],
)
def test_text_free_poolings_are_noted(tmp_path, tiny_model, images, capsys, options, note):
    checkpoint = write_checkpoint(tmp_path, tiny_model, **options)
    command = [str(checkpoint), "--images", images[0], "--captions", "a", "b", "--out", str(tmp_path / "x.svg")]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert note in record["notes"][0]
    assert note in (tmp_path / "x.svg").read_text()  # svg text stays text


@pytest.mark.slow
def test_a_users_text_conditioned_pooling_has_weights_per_caption(tmp_path, tiny_model, images, capsys):
    (tmp_path / "mine.py").write_text(
        "from llip.open_clip.pooling import TextConditionedPooling\n\n\nclass Mine(TextConditionedPooling):\n    pass\n"
    )
    checkpoint = write_checkpoint(tmp_path, tiny_model, mixture_tokens=3, pooling=f"{tmp_path}/mine.py:Mine")
    command = [str(checkpoint), "--images", images[0], "--captions", "a", "b", "--out", str(tmp_path / "x.svg")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert "every caption" not in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("which", ["patches", "both"])
def test_captions_that_attend_to_patches(tmp_path, tiny_model, images, capsys, which):
    checkpoint = write_checkpoint(tmp_path, tiny_model, pooling="flair", pair_tokens=which)
    command = [str(checkpoint), "--images", images[0], "--captions", "a", "b", "--out", str(tmp_path / "x.png")]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["notes"] == []
    image = record["images"][0]
    weights, maps = np.array(image["weights"]), np.array(image["caption_maps"])
    patches = weights[:, 1:] if which == "both" else weights
    assert patches.shape[1] == maps[0].size
    if which == "patches":  # a caption looks where its weights are
        np.testing.assert_allclose(maps.reshape(2, -1), patches, atol=1e-5)


@pytest.mark.slow
def test_a_plain_open_clip_model(plain_model, images, tmp_path, capsys):
    """Its class token is the one mixture token; the map is its attention in the last block."""
    command = [str(plain_model), "--images", *images, "--captions", "a", "b", "--out", str(tmp_path / "x.png")]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = llip.open_model(plain_model)
    with torch.no_grad():
        pixels = torch.stack([model.preprocess_val(Image.open(path)) for path in images])
        expected = model.similarity(model.encode_image(pixels), model.encode_text(model.tokenizer(["a", "b"])))
    np.testing.assert_allclose([image["scores"] for image in record["images"]], expected, atol=2e-5)
    maps = np.array(record["images"][0]["token_maps"])
    assert maps.shape == (1, 2, 2)
    assert 0.5 < maps.sum() < 1


def test_16_bit_greys_are_scaled(checkpoint, tmp_path, capsys):
    """As in training: PIL's own conversion makes nearly all of them white."""
    values = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "8.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "16.png")
    images = [str(tmp_path / "8.png"), str(tmp_path / "16.png")]
    assert main([str(checkpoint), "--images", *images, "--captions", "a", "b", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["images"]
    assert first["scores"] == second["scores"]


def test_captions_in_other_scripts_and_with_dollars(checkpoint, images, tmp_path, capsys, monkeypatch):
    """A font that covers them is chosen; what none covers is named; no caption is read as a formula."""
    paths = [write_font(tmp_path / "cjk.ttf", "Test CJK", "红星左边")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    captions = ["红星在左边" * 20, r"costs $5 and $\nothing", "звезда"]
    figure = tmp_path / "x.svg"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Glyph.*")
        assert main([str(checkpoint), "--images", images[0], "--captions", *captions[1:], "--out", str(figure)]) == 0
    assert "note:" not in capsys.readouterr().err
    assert r"costs $5 and $\nothing" in figure.read_text()
    assert main([str(checkpoint), "--images", images[0], "--captions", *captions, "--out", str(figure)]) == 0
    assert "note: no installed font has 在" in capsys.readouterr().err
    assert "'DejaVu Sans', 'Test CJK'" in figure.read_text()
    assert "红星在左边" in figure.read_text()


def test_scenes_are_drawn_with_captions_and_repeat(checkpoint, capsys):
    for _ in range(2):
        assert main([str(checkpoint), "--scenes", "2", "--json"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert len(json.loads(first)["captions"]) >= 4
    images, captions = draw_scenes(3, 48, seed=5)
    assert [image.size for image in images] == [(48, 48)] * 3
    assert captions == draw_scenes(3, 48, seed=5)[1] != draw_scenes(3, 48, seed=6)[1]


def test_effective_tokens_and_order_by_hand():
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(effective_tokens(weights), torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    assert tokens_that_matter(torch.tensor([[0.0, 0.45, 0.55], [0.6, 0.4, 0.0]]), 2) == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --images"),
        (["--images", "{image}"], "needs --captions"),
        (["--images", "{image}", "--captions", "a"], "--out"),
        (["--images", "{image}", "--captions", *"abcdefghi", "--json"], "9 given"),
        (["--images", "{image}x", "--captions", "a", "--json"], "is not there. Did you mean 'one.png'"),
        (["--images", "{checkpoint}", "--captions", "a", "--json"], "cannot be read"),
        (["--images", "{image}", "--captions", "a", "--json", "--device", "gpu"], "this machine has cpu"),
        (["--scenes", "0", "--json"], "--scenes: 0"),
        (["--scenes", "1", "--out", "x.jpg"], "ends in .png"),
        (["--scenes", "1", "--out", "nowhere/x.png"], "folder 'nowhere' is not there"),
        (["--scenes", "1", "--seed", "-1", "--json"], "--seed -1"),
        (["--images", ".", "--captions", "a", "--json"], "'.' is a folder"),
    ],
)
def test_mistakes_are_reported(checkpoint, images, capsys, arguments, message):
    filled = [word.format(image=images[0], checkpoint=checkpoint) for word in arguments]
    assert main([str(checkpoint), *filled]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_weights_that_are_not_finite_are_refused(checkpoint, images, tmp_path, capsys):
    stored = torch.load(checkpoint)
    stored["state_dict"]["pooling.v_proj.weight"][0, 0] = float("nan")
    torch.save(stored, tmp_path / "nan.pt")
    assert main([str(tmp_path / "nan.pt"), "--images", *images, "--captions", "a", "--json"]) == 2
    assert "parameter pooling.v_proj.weight" in capsys.readouterr().err
    assert export([str(tmp_path / "nan.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "parameter pooling.v_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pair_tokens", "named"), [("patches", "weights over patches"), ("both", "tokens and patches")]
)
def test_the_figure_names_what_captions_attend_to(tmp_path, tiny_model, images, capsys, pair_tokens, named):
    checkpoint = write_checkpoint(tmp_path, tiny_model, mixture_tokens=3, pair_tokens=pair_tokens)
    command = [str(checkpoint), "--images", images[0], "--captions", "a", "b", "--out", str(tmp_path / "x.svg")]
    assert main(command) == 0
    assert named in (tmp_path / "x.svg").read_text()
