"""Poolings, objectives, image and caption transforms named `path/to/file.py:Name`: one mechanism for all four."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llip
from llip.config_search import search_config
from llip.configs import Config
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data
from llip.data.transforms import EMPTY_CAPTION
from llip.errors import UserError
from llip.extensions import check_extension, copy_extensions, find_extension, relocate
from llip.main import main, train
from llip.training.checkpoints.records import read_records
from tests.helpers import tiny_run, write_pairs

EXAMPLE = Path(__file__).parents[1] / "examples" / "extensions.py"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)


@pytest.fixture
def example(tmp_path) -> dict[str, str]:
    """The four names of the example, from a copy of its file."""
    file = tmp_path / "lab" / "extensions.py"
    file.parent.mkdir()
    file.write_text(EXAMPLE.read_text())
    names = {
        "pooling": "GatedTokens", "loss": "HINGE", "image_transform": "dimmed", "caption_transform": "without_article",
    }  # fmt: skip
    return {field: f"{file}:{name}" for field, name in names.items()}


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read_records(config.folder / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_all_four_train_resume_and_load_elsewhere(tmp_path, example, workers, monkeypatch):
    config = tiny_run(tmp_path, epochs=10, workers=workers, save_steps=5, **example)
    train(config, "cpu")
    assert losses(config)[-1] < 0.9 * losses(config)[0]
    resumed = config.replace(name="resumed", resume=str(config.folder / "checkpoints" / "step_15.pt"))
    train(resumed, "cpu")
    assert losses(resumed) == losses(config)[15:]

    # the original file is gone, and another program in another folder loads the checkpoint
    Path(example["pooling"].rpartition(":")[0]).unlink()
    monkeypatch.chdir("/")
    model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt")
    h, t = torch.randn(3, 4, 16), torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    weights = model.mixture_weights(h, t)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 5, 1))
    torch.testing.assert_close(model.similarity(h, t), torch.einsum("btd,td->bt", model.contextualize(h, t), t))


def test_the_example_config(tmp_path):
    config = search_config(f"{EXAMPLE}:custom")
    assert config.pooling == f"{EXAMPLE}:GatedTokens"
    assert find_extension("pooling", config.pooling) is find_extension("pooling", f"{EXAMPLE}:GatedTokens")


TRANSFORMS = """
import numpy as np

seen = []


def image(pixels, seed):
    assert pixels.dtype == np.uint8 and pixels.shape == (40, 40, 3)
    return np.full((7, 9, 3), seed % 251, np.uint8)


def caption(text, seed):
    return f"word{seed % 13}"


def nothing(text, seed):
    return " "


def fails(value, seed):
    return value / "0"


def grey(pixels, seed):
    return pixels[..., 0]


def number(value, seed):
    return 3


def leaves(value, seed):
    raise SystemExit(3)
"""


def batches(tmp_path, count: int = 2, workers: int = 0, **fields):
    (tmp_path / "t.py").write_text(TRANSFORMS)
    data = write_pairs(tmp_path / "pairs", 16, 8)
    names = {field: f"{tmp_path}/t.py:{name}" for field, name in fields.items() if field.endswith("_transform")}
    config = Config(train_data=data, batch_size=8, workers=workers, **fields | names)
    texts: list[str] = []

    def tokenizer(captions):
        texts.extend(captions)
        return torch.tensor(
            [[int(caption.removeprefix("word") or 0)] if caption[4:].isdigit() else [0] for caption in captions]
        )

    dataset = CaptionedImages(config, parse_train_data(data), tokenizer, 32, DataPosition(workers))
    loader = iter(make_loader(dataset, pin=False))
    return [next(loader) for _ in range(count)]


def test_transforms_see_what_they_are_promised_and_repeat_by_the_seed(tmp_path):
    first, again = (batches(tmp_path, 4, image_transform="image", caption_transform="caption") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert not one.error
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert all(len(image.unique()) == 1 for image in one.images)  # the crop of a constant image
    assert len({int(value) for batch in first for value in batch.images[:, 0, 0, 0]}) > 8  # seeds differ
    assert len({int(value) for batch in first for value in batch.tokens.flatten()}) > 3


def test_each_caption_of_an_image_has_its_seed(tmp_path):
    (one,), (several,) = (
        batches(tmp_path, 1, captions_per_image=count, caption_transform="caption") for count in (1, 5)
    )
    assert torch.equal(several.tokens[:, :1], one.tokens)
    assert all(len(row.unique()) > 1 for row in several.tokens)  # five seeds each
    assert not several.mask[:, 1:].any()  # the caption itself comes again


def test_a_caption_without_text_drops_the_sample(tmp_path):
    (batch,) = batches(tmp_path, 1, caption_transform="nothing")
    assert EMPTY_CAPTION in batch.error


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("image_transform", "fails", "image_transform fails failed: line 21: "),
        ("image_transform", "leaves", "image_transform leaves failed: line 33: SystemExit: 3"),
        ("image_transform", "grey", "image_transform grey returned uint8 of shape (40, 40), expected a numpy array"),
        ("image_transform", "number", "image_transform number returned int of shape None"),
        ("caption_transform", "fails", "caption_transform fails failed: line 21: TypeError: unsupported operand"),
        ("caption_transform", "number", "caption_transform number returned int, expected str"),
    ],
)
def test_a_transform_that_breaks_its_promise_is_one_message(tmp_path, field, name, message):
    (batch,) = batches(tmp_path, 1, **{field: name})
    assert message in batch.error
    assert re.search(r"\(sample 0000\d\.tar/0000\d_0000\d\)$", batch.error)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("pooling", "txt", r"config field pooling = 'txt': expected one of 'first'.*Did you mean 'text'"),
        ("loss", "sigmiod", r"config field loss = 'sigmiod'.*Did you mean 'sigmoid'"),
        ("image_transform", "flip", r"config field image_transform = 'flip': expected path/to/file\.py:Name"),
        ("pooling", "mine.py", r"expected one of .*, or path/to/file\.py:Name"),
    ],
)
def test_an_unknown_name_lists_what_is_expected(field, name, message):
    with pytest.raises(UserError, match=message):
        check_extension(field, name)
    with pytest.raises(UserError, match=message):
        Config(**{field: name})


def test_a_file_that_is_missing_or_lacks_the_name(tmp_path):
    with pytest.raises(UserError, match=r"pooling = .*gone\.py:Mine': there is no file .*gone\.py' \(looked for"):
        find_extension("pooling", f"{tmp_path}/gone.py:Mine")
    (tmp_path / "mine.py").write_text("class Pooled: pass\n")
    with pytest.raises(UserError, match=r"mine\.py defines no 'Poled'.*'Pooled'"):
        find_extension("pooling", f"{tmp_path}/mine.py:Poled")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", r"line 1: SyntaxError: '\(' was never closed"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_does_not_run_names_its_line(tmp_path, content, reason):
    (tmp_path / "mine.py").write_text(content)
    modules = set(sys.modules)
    with pytest.raises(UserError, match=rf"mine\.py' does not run: {reason}$"):
        find_extension("pooling", f"{tmp_path}/mine.py:Pooled")
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("field", "name", "found"),
    [
        ("loss", "function", "expected an Objective, found function 'function'"),
        ("loss", "Class", "expected an Objective, found a class 'Class'"),
        ("pooling", "function", "expected a class with a method `build`.* found function 'function'"),
        ("pooling", "Class", "expected a class with a method `build`.* found a class 'Class'"),
        ("image_transform", "number", "expected a function of an image and a seed, found int 'number'"),
        ("caption_transform", "number", "expected a function of a caption and a seed, found int 'number'"),
    ],
)
def test_an_object_of_another_kind_is_refused(tmp_path, field, name, found):
    (tmp_path / "mine.py").write_text("number = 3\ndef function(a, b): ...\nclass Class: ...\n")
    with pytest.raises(UserError, match=found):
        find_extension(field, f"{tmp_path}/mine.py:{name}")


def test_mistakes_on_the_command_line_are_one_message(tmp_path, capsys):
    config = tiny_run(tmp_path)
    fields = [f"{name}={getattr(config, name)}" for name in ("train_data", "model", "batch_size", "train_num_samples")]
    words = ["llip_quickstart", *fields, f"logs={tmp_path}", "caption_keys=txt", "evals=none", "eval_steps=0"]
    assert main([*words, f"image_transform={tmp_path}/gone.py:f"]) == 2
    error = capsys.readouterr().err
    assert "there is no file" in error
    assert "Traceback" not in error


def test_a_run_keeps_copies_and_relocates_to_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.py").write_text("x = 1")
    copy_extensions([tmp_path / "a" / "mine.py"] * 2, tmp_path / "copies")
    fields = {"pooling": f"{tmp_path}/a/mine.py:Mine", "loss": "sigmoid", "image_transform": None}
    assert relocate(fields, tmp_path / "copies") == {}
    copy = {"pooling": f"{tmp_path}/copies/mine.py:Mine"}
    assert relocate(fields, tmp_path / "copies", prefer=True) == copy
    (tmp_path / "a" / "mine.py").unlink()
    assert relocate(fields, tmp_path / "copies") == copy
    with pytest.raises(UserError, match=r"no file .*/a/mine\.py'.*; a copy is .*/copies/mine\.py: name it instead"):
        copy_extensions([tmp_path / "a" / "mine.py"], tmp_path / "copies")
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(name)
    with pytest.raises(UserError, match="have one name"):
        copy_extensions([tmp_path / "b" / "mine.py", tmp_path / "c" / "mine.py"], tmp_path / "copies")


def test_what_is_shipped_can_be_found():
    names = [find_extension("pooling", name).__name__ for name in ("first", "text")]
    assert names == ["FirstToken", "TextConditionedPooling"]
    assert find_extension("loss", "softmax").bias is None


def test_no_torch_is_needed_to_check_the_names():
    code = "import sys, llip.config_search as c; c.search_config('llip_b16'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
