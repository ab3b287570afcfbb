"""Cached class features: when the text tower runs, when it does not, and what a damaged file costs."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llip.clipeval.task_result import TaskResult
from llip.clipeval.texts.cache import hash_weights
from tests.clipeval import fakes
from tests.clipeval.fakes import FakeModel, tokenize, write_catalog, write_wds
from tests.helpers import ProcessPool

CLASSES = ["ant", "bee", "cow", "dog", "emu"]


class CountingModel(FakeModel):
    """Counts the texts it encodes."""

    texts = 0

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts += len(tokens)
        return super().encode_text(tokens)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_wds(tmp_path / "wds", [i % 5 for i in range(20)], CLASSES)
    write_catalog(tmp_path / "catalog.json", {"t": {"type": "webdataset", "path": "wds"}})
    return tmp_path


def evaluate(folder: Path, model: FakeModel, **options: object) -> TaskResult:
    options = {"cache_dir": folder / "cache"} | options
    (result,) = fakes.evaluate(model, folder / "catalog.json", **options)
    assert result.error is None
    return result


def texts_encoded(folder: Path, seed: int = 0, **options: object) -> int:
    model = CountingModel(seed)
    evaluate(folder, model, **options)
    return model.texts


def test_the_second_time_no_text_is_encoded(folder: Path) -> None:
    plain = evaluate(folder, FakeModel(), cache_dir=None)
    assert not (folder / "cache").exists()
    model = CountingModel()
    first = evaluate(folder, model)
    assert model.texts == 10  # 5 classes, 2 prompts
    again = CountingModel()
    second = evaluate(folder, again)
    assert again.texts == 0
    assert plain.values == first.values == second.values
    assert all(path.suffix == ".npz" for path in (folder / "cache").iterdir())  # no temporary file is left


def test_what_changes_the_features_encodes_again(folder: Path) -> None:
    assert texts_encoded(folder) == 10
    assert texts_encoded(folder, seed=1) == 10
    assert texts_encoded(folder, prompt_ensemble="score") == 10
    assert texts_encoded(folder, autocast_dtype=torch.bfloat16) == 10
    (folder / "wds/zeroshot_classification_templates.txt").write_text("one {c}\n")
    assert texts_encoded(folder) == 5
    (folder / "wds/classnames.txt").write_text("\n".join(reversed(CLASSES)) + "\n")
    assert texts_encoded(folder) == 5
    assert texts_encoded(folder) == 0
    assert texts_encoded(folder, cache_dir=None) == 5


def test_another_tokenizer_encodes_again(folder: Path) -> None:
    assert texts_encoded(folder) == 10
    model = CountingModel()
    model.tokenizer = lambda texts: tokenize([text.upper() for text in texts])
    evaluate(folder, model)
    assert model.texts == 10


def test_weights_and_layout_are_hashed() -> None:
    model = FakeModel()
    first = hash_weights(model)
    assert hash_weights(FakeModel()) == first
    with torch.no_grad():
        model.words.weight[3, 2] += 1e-6
    assert hash_weights(model) != first
    model = FakeModel()
    model.dropout = torch.nn.Dropout(0.25)  # no weights: only the layout shows it
    assert hash_weights(model) != first
    model = FakeModel()
    model.text = torch.nn.Linear(2, 2)
    second = hash_weights(model)
    with torch.no_grad():
        model.words.weight[3, 2] += 1  # not part of what is called text
    assert hash_weights(model) == second


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_file_is_rebuilt_with_a_warning(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = evaluate(folder, CountingModel()).values
    (path,) = (folder / "cache").iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1  # among the numbers: only a checksum shows it
    path.write_bytes({"truncated": whole[:-40], "flipped": bytes(flipped), "empty": b"", "other": b"hello"}[damage])
    model = CountingModel()
    with caplog.at_level(logging.WARNING):
        assert evaluate(folder, model).values == expected
    assert model.texts == 10
    assert f"cached text features {path} are damaged" in caplog.text
    assert path.read_bytes() == whole
    assert texts_encoded(folder) == 0


def test_a_folder_that_cannot_be_written_costs_no_task(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cache").write_text("a file, not a folder")
    assert evaluate(folder, FakeModel()).value is not None
    assert "cannot be cached" in caplog.text


def _count_texts(rank: int, count: int, folder: Path) -> list[int]:
    """What each of the two processes does: evaluate twice."""
    return [texts_encoded(folder) for _ in range(2)]


@pytest.mark.slow
def test_two_processes_share_the_work_and_the_file(folder: Path, pool: ProcessPool) -> None:
    assert pool.run(_count_texts, 2, folder) == [[6, 0], [4, 0]]  # classes 0, 2, 4 and 1, 3
    assert len(list((folder / "cache").iterdir())) == 1
    assert texts_encoded(folder) == 0  # one process alone finds the same file


def test_each_text_of_synonyms_is_encoded_once(folder: Path) -> None:
    """Repeated to the least common multiple, 1 to 5 names of 2 templates would be 5 * 120 texts."""
    names = [[f"{name} {i}" for i in range(count)] for count, name in enumerate(CLASSES, start=1)]
    entry = {"type": "webdataset", "path": "wds", "classnames": "names.json"}
    (folder / "names.json").write_text(json.dumps(names))
    write_catalog(folder / "catalog.json", {"t": entry})
    assert texts_encoded(folder) == 2 * (1 + 2 + 3 + 4 + 5)
    assert texts_encoded(folder, cache_dir=None, prompt_ensemble="score") == 2 * (1 + 2 + 3 + 4 + 5)
    names[1:3] = [[names[1][0]], [names[1][1], *names[2]]]  # the same texts, of other classes
    (folder / "names.json").write_text(json.dumps(names))
    assert texts_encoded(folder) == 2 * (1 + 2 + 3 + 4 + 5)
