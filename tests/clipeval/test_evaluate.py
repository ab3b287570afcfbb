"""Zero-shot and retrieval results against plain loops, alone and on two processes; and how trouble is reported."""

import os
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.main_distributed import launch
from llip.clipeval.catalog import load_catalog
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.labels import Labels
from llip.clipeval.online import evaluate_online, load_online_eval
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.clipeval.zero_shot import Scorer, class_features, class_scores
from llip.errors import UserError
from tests.clipeval.fakes import (
    FakeModel,
    captions_of,
    picture,
    preprocess,
    tokenize,
    write_catalog,
    write_imagefolder,
    write_retrieval,
    write_wds,
)

CLASSES = ["ant", "bee", "cow", "dog", "emu", "fox", "gnu"]
LABELS = [(i * 5 + i // 3) % 7 for i in range(41)]
CAPTIONED = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and a catalog over them that also names broken ones."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_wds(folder / "wds", LABELS, CLASSES)
    write_retrieval(folder / "pairs", CAPTIONED)
    write_imagefolder(folder / "broken_image", CLASSES[:2], 3)
    (folder / "broken_image/bee/000.png").write_bytes(b"broken")
    write_imagefolder(folder / "all_broken", CLASSES[:2], 1)
    for path in (folder / "all_broken").rglob("*.png"):
        path.write_bytes(b"broken")
    (folder / "empty/ant").mkdir(parents=True)
    (folder / "empty/bee").mkdir()
    prompts = {"prompts": ["a {c}"]}
    write_catalog(
        folder / "catalog.json",
        {
            "top1": {"type": "webdataset", "path": "wds"},
            "top5": {"type": "webdataset", "path": "wds", "metric": "top5"},
            "pairs": {"type": "retrieval", "path": "pairs"},
            "missing": {"type": "imagefolder", "path": "gone", **prompts},
            "empty": {"type": "imagefolder", "path": "empty", **prompts},
            "broken_image": {"type": "imagefolder", "path": "broken_image", **prompts},
            "all_broken": {"type": "imagefolder", "path": "all_broken", **prompts},
            "few_names": {"type": "imagefolder", "path": "broken_image", "classnames": ["a", "b", "c"], **prompts},
            "label_beyond": {"type": "webdataset", "path": "wds", "num_classes": 6},
            "too_few_images": {"type": "webdataset", "path": "wds", "num_images": 42},
            "wrong_metric": {"type": "imagefolder", "path": "broken_image", "metric": "top5", **prompts},
        },
    )
    return folder


def evaluate(folder: Path, *tasks: str, model: FakeModel | None = None, **options: object) -> list[TaskResult]:
    options = {"device": "cpu", "batch_size": 8, "workers": 0, "progress": False} | options
    catalog = load_catalog(folder / "catalog.json")
    return evaluate_tasks(model or FakeModel(), preprocess, tokenize, tasks or None, catalog, **options)


def image_tokens(model: FakeModel, count: int) -> list[Tensor]:
    return [model.encode_image(preprocess(picture(i))[None]) for i in range(count)]


def dense_score(model: FakeModel, h: Tensor, t: Tensor) -> float:
    return model.similarity(h, t[None]).item()


def plain_loop(model: FakeModel, ensemble: str) -> list[list[float]]:
    """Scores [image][class], one pair at a time."""
    model.eval()
    rows = []
    for h in image_tokens(model, len(LABELS)):
        row = []
        for name in CLASSES:
            prompts = [model.encode_text(tokenize([text]))[0] for text in (f"a photo of {name}", f"the {name}")]
            if ensemble == "feature":
                row.append(dense_score(model, h, F.normalize(sum(prompts), dim=0)))
            else:
                row.append(sum(dense_score(model, h, prompt) for prompt in prompts) / 2)
        rows.append(row)
    return rows


@pytest.mark.parametrize("ensemble", ["feature", "score"])
@torch.no_grad()
def test_classification_equals_a_plain_loop(folder: Path, ensemble: str) -> None:
    scores = plain_loop(FakeModel(), ensemble)
    ranked = [sorted(range(7), key=lambda c: -row[c]) for row in scores]
    expected1 = sum(order[0] == label for order, label in zip(ranked, LABELS, strict=True)) / 41
    expected5 = sum(label in order[:5] for order, label in zip(ranked, LABELS, strict=True)) / 41
    top1, top5 = evaluate(folder, "top1", "top5", prompt_ensemble=ensemble)
    assert (top1.value, top1.n, top1.error) == (pytest.approx(expected1), 41, None)
    assert top5.value == pytest.approx(expected5)
    assert 0 < top1.value < top5.value < 1  # else the comparison says little


@pytest.mark.parametrize("ensemble", ["feature", "score"])
@torch.no_grad()
def test_scores_equal_a_plain_loop(ensemble: str) -> None:
    model = FakeModel().eval()
    scorer = Scorer(model, preprocess, tokenize, torch.device("cpu"))
    labels = Labels(tuple(CLASSES), ("a photo of {c}", "the {c}"))
    features = class_features(scorer, labels, range(7), ensemble)
    h = torch.cat(image_tokens(model, len(LABELS)))
    expected = torch.tensor(plain_loop(model, ensemble))
    torch.testing.assert_close(class_scores(scorer, h, features), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_retrieval_equals_a_plain_loop(folder: Path) -> None:
    model = FakeModel().eval()
    texts = [(i, text) for i in range(CAPTIONED) for text in captions_of(i)]
    features = [model.encode_text(tokenize([text]))[0] for _, text in texts]
    scores = [[dense_score(model, h, t) for t in features] for h in image_tokens(model, CAPTIONED)]
    (result,) = evaluate(folder, "pairs")
    assert (result.n, result.texts, result.value) == (CAPTIONED, len(texts), None)
    for k in (1, 5, 10):
        best_texts = [sorted(range(len(texts)), key=lambda j: -row[j])[:k] for row in scores]
        image_hits = [any(texts[j][0] == i for j in best) for i, best in enumerate(best_texts)]
        best_images = [sorted(range(CAPTIONED), key=lambda i: -scores[i][j])[:k] for j in range(len(texts))]
        text_hits = [owner in best for (owner, _), best in zip(texts, best_images, strict=True)]
        assert result.values[f"image_to_text_R@{k}"] == pytest.approx(sum(image_hits) / CAPTIONED)
        assert result.values[f"text_to_image_R@{k}"] == pytest.approx(sum(text_hits) / len(texts))
    assert len(set(result.values.values())) > 3  # else the comparison says little


def _evaluate_to_file(device: str, folder: Path) -> None:
    """What each of the two processes does; every process writes what it saw."""
    results = evaluate(folder, device=device)
    torch.save([result.to_json() for result in results], folder / f"rank{torch.distributed.get_rank()}.pt")


TIMES = ("seconds", "images_per_second")


def test_two_processes_give_the_results_of_one(folder: Path) -> None:
    launch(_evaluate_to_file, ["cpu", "cpu"], folder)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0] == ranks[1]
    alone = [result.to_json() for result in evaluate(folder)]
    for task in (*ranks[0], *alone):
        for key in TIMES:
            task.pop(key)
        if "error" in task:  # says which process failed
            task["error"] = task["error"].split(" (process ")[0]
    assert ranks[0] == alone


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("missing", "dataset folder gone is not in"),
        ("empty", "the dataset is empty"),
        ("all_broken", "none of 2 images can be read; the first is .*ant/000.png"),
        ("few_names", "3 class names for a dataset of 2 classes.*class 0"),
        ("label_beyond", "7 class names, but the entry expects num_classes = 6"),
        ("too_few_images", "41 images, but the entry expects num_images = 42"),
        ("wrong_metric", "'top5' is 1 by definition with 2 classes"),
    ],
)
def test_a_broken_dataset_is_reported_and_the_others_run(folder: Path, task: str, words: str) -> None:
    broken, good = evaluate(folder, task, "top1")
    assert broken.values == {}
    assert broken.value is None
    assert re.search(words, broken.error), broken.error
    assert good.error is None
    assert classification_mean([broken, good]) == good.value


def test_label_without_a_class_name(tmp_path: Path) -> None:
    write_wds(tmp_path / "wds", [0, 1, 7], CLASSES)
    write_catalog(tmp_path / "catalog.json", {"t": {"type": "webdataset", "path": "wds"}})
    (result,) = evaluate(tmp_path, "t")
    assert "1.tar:00002 has label 7, but there are 7 class names" in result.error


def test_unreadable_images_are_counted_and_named(folder: Path) -> None:
    (result,) = evaluate(folder, "broken_image")
    assert (result.n, result.skipped, result.error) == (5, 1, None)
    assert "bee/000.png" in result.skipped_images[0]


def test_unknown_task_or_ensemble(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'top2'.*'top1'"):
        evaluate(folder, "top2")
    with pytest.raises(UserError, match=r"prompt_ensemble = 'features'.*'feature'"):
        evaluate(folder, "top1", prompt_ensemble="features")


@pytest.mark.parametrize("workers", [0, 1])
def test_modes_and_random_state_are_left_alone(folder: Path, workers: int) -> None:
    model = FakeModel().train()
    model.image.eval()  # a frozen part stays frozen
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(4), random.random()
    torch.manual_seed(3)
    random.seed(3)
    seen = []
    first = evaluate(folder, "top1", model=model, workers=workers, on_result=seen.append)
    assert torch.equal(torch.rand(4), expected[0])
    assert random.random() == expected[1]
    assert (model.training, model.image.training, model.dropout.training) == (True, False, True)
    assert torch.is_grad_enabled()
    assert seen == first
    assert first[0].value == evaluate(folder, "top1")[0].value  # dropout was off


def test_result_survives_json(folder: Path) -> None:
    for result in evaluate(folder, "top1", "pairs", "missing", "broken_image"):
        assert TaskResult.from_json(result.task, result.to_json()) == result
    assert evaluate(folder, "top1")[0].to_json()["metric"] == "top1"


def test_online(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "online.yaml"
    path.write_text(f"catalog_name: {folder / 'catalog.json'}\ntasks: [top1, pairs]\nbatch_size: 8\nworkers: 0\n")
    results = evaluate_online(FakeModel(), preprocess, tokenize, load_online_eval(path), "cpu")
    assert [(r.task, r.values) for r in results] == [(r.task, r.values) for r in evaluate(folder, "top1", "pairs")]
    path.write_text(f"catalog_name: {folder / 'catalog.json'}\ntasks: [top1, pair]\n")
    with pytest.raises(UserError, match=r"'pair'.*'pairs'"):
        load_online_eval(path)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    assert len(load_online_eval("config_evals/scenes_online.yaml").tasks) == 4
    assert "imagenet" in load_online_eval("config_evals/llip_online.yaml").tasks
