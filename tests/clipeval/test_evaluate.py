"""Zero-shot and retrieval results against plain loops, alone and on two processes; and how trouble is reported."""

import io
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llip.clipeval.catalog.catalog import load_evaluation
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.clipeval.task_run import TaskRun
from llip.clipeval.texts.classifier import build_classifier
from llip.clipeval.texts.labels import Labels
from llip.errors import UserError
from tests.clipeval import fakes
from tests.clipeval.fakes import (
    FakeModel,
    captions_of,
    picture,
    png,
    preprocess,
    tokenize,
    write_catalog,
    write_imagefolder,
    write_retrieval,
    write_tar,
    write_wds,
)
from tests.helpers import ProcessPool

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
    write_several(folder / "several")
    prompts = {"prompts": ["a {c}"]}
    names = {"classnames": CLASSES, **prompts}
    write_catalog(
        folder / "catalog.json",
        {
            "top1": {"type": "webdataset", "path": "wds"},
            "top5": {"type": "webdataset", "path": "wds", "metric": "top5"},
            "both": {"type": "webdataset", "path": "wds", "metrics": ["top5", "top1", "mean_per_class"]},
            "both_wrong": {"type": "imagefolder", "path": "broken_image", "metrics": ["top1", "top5"], **prompts},
            "pairs": {"type": "retrieval", "path": "pairs"},
            "missing": {"type": "imagefolder", "path": "gone", **prompts},
            "empty": {"type": "imagefolder", "path": "empty", **prompts},
            "broken_image": {"type": "imagefolder", "path": "broken_image", **prompts},
            "all_broken": {"type": "imagefolder", "path": "all_broken", **prompts},
            "few_names": {"type": "imagefolder", "path": "broken_image", "classnames": ["a", "b", "c"], **prompts},
            "label_beyond": {"type": "webdataset", "path": "wds", "num_classes": 6},
            "too_few_images": {"type": "webdataset", "path": "wds", "num_images": 42},
            "map": {"type": "webdataset", "path": "several", "label_key": "npy", "metric": "mAP", **names},
            "one_of_several": {"type": "webdataset", "path": "several", "label_key": "npy", **names},
            "wrong_metric": {"type": "imagefolder", "path": "broken_image", "metric": "top5", **prompts},
        },
    )
    return folder


SEVERAL = [[(i * k) % 4 == 1 for k in range(1, 8)] for i in range(11)]  # images 0, 4, 8 are of no class


def write_several(root: Path) -> None:
    """Write images that are of several classes each."""
    members = {}
    for i, row in enumerate(SEVERAL):
        buffer = io.BytesIO()
        np.save(buffer, np.array(row, np.int64))
        members |= {f"{i:05d}.png": png(picture(i)), f"{i:05d}.npy": buffer.getvalue()}
    write_tar(root / "test/0.tar", members)


def evaluate(folder: Path, *tasks: str, model: FakeModel | None = None, **options: object) -> list[TaskResult]:
    options = {"batch_size": 8} | options
    return fakes.evaluate(model or FakeModel(), folder / "catalog.json", tasks or None, **options)


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


class Counting(FakeModel):
    """Counts the images and texts it encodes."""

    images = texts = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return super().encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts += len(tokens)
        return super().encode_text(tokens)


def test_several_metrics_from_one_pass(folder: Path) -> None:
    model = Counting()
    (both,) = evaluate(folder, "both", model=model)
    assert (model.images, model.texts) == (len(LABELS), 2 * len(CLASSES))
    top1, top5 = evaluate(folder, "top1", "top5")
    assert list(both.values) == ["top5", "top1", "mean_per_class"]
    assert (both.metric, both.value) == ("top5", top5.value)
    assert both.values["top1"] == top1.value
    assert both.outcomes.samples == top1.outcomes.samples
    (wrong,) = evaluate(folder, "both_wrong", model=model)
    assert "metric 'top5' is 1 by definition with 2 classes" in wrong.error
    assert (model.images, model.texts) == (len(LABELS), 2 * len(CLASSES))  # found before anything is encoded


@pytest.mark.parametrize("ensemble", ["feature", "score"])
@torch.no_grad()
def test_scores_equal_a_plain_loop(ensemble: str) -> None:
    model = FakeModel().eval()
    scorer = Scorer(model, preprocess, tokenize, torch.device("cpu"))
    labels = Labels(tuple(CLASSES), ("a photo of {c}", "the {c}"))
    classifier = build_classifier(TaskRun(scorer, EvalConfig(prompt_ensemble=ensemble)), labels)
    h = torch.cat(image_tokens(model, len(LABELS)))
    expected = torch.tensor(plain_loop(model, ensemble))
    torch.testing.assert_close(classifier.scores(scorer, h), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_images_of_several_classes(folder: Path) -> None:
    """mAP by its definition: precision at the place of each right image, averaged within each class."""
    model = FakeModel().eval()
    texts = [model.encode_text(tokenize([f"a {name}"]))[0] for name in CLASSES]
    scores = [[dense_score(model, h, t) for t in texts] for h in image_tokens(model, len(SEVERAL))]
    precisions = []
    for label in range(7):
        order = sorted(range(len(SEVERAL)), key=lambda i: -scores[i][label])
        places = [place for place, i in enumerate(order, start=1) if SEVERAL[i][label]]
        if places:
            precisions.append(sum(n / place for n, place in enumerate(places, start=1)) / len(places))
    (result,) = evaluate(folder, "map", batch_size=4)
    assert result.value == pytest.approx(sum(precisions) / len(precisions), abs=1e-6)
    assert (result.metric, result.n) == ("mAP", 11)
    ranked = [sorted(range(7), key=lambda c: -row[c]) for row in scores]
    places = [[order.index(c) for c in range(7) if row[c]] for order, row in zip(ranked, SEVERAL, strict=True)]
    best = [min([*found, 5]) for found in places]  # 5: not among the five best, or of no class
    assert result.outcomes.ranks.tolist() == best
    assert 5 in best


@pytest.mark.parametrize("kind", ["one class", "several classes", "captions"])
def test_the_hash_of_the_data_follows_targets(tmp_path: Path, kind: str) -> None:
    """The same images with one other label, or caption, are other data."""
    hashes = []
    for value in (0, 1, 0):
        buffer = io.BytesIO()
        np.save(buffer, np.array([1, value, 0]))
        target = {"one class": str(value), "several classes": buffer.getvalue(), "captions": f"a\nb {value}"}[kind]
        suffix = {"one class": "cls", "several classes": "npy", "captions": "txt"}[kind]
        write_tar(tmp_path / "set/test/0.tar", {"0.png": png(picture(0)), f"0.{suffix}": target})
        names = {"classnames": CLASSES[:3], "prompts": ["a {c}"], "metric": "top1"}
        entry = {"type": "webdataset", "path": "set", "label_key": suffix, **names}
        if kind == "several classes":
            entry["metric"] = "mAP"
        if kind == "captions":
            entry = {"type": "retrieval", "path": "set"}
        write_catalog(tmp_path / "catalog.json", {"t": entry})
        (result,) = evaluate(tmp_path, "t")
        assert result.error is None
        hashes.append(result.samples)
    assert hashes[0] == hashes[2] != hashes[1]


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


TIMES = ("seconds", "images_per_second")


def _results(rank: int, count: int, folder: Path) -> list[dict]:
    """What each process does."""
    return [result.to_json() for result in evaluate(folder)]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_results_of_one(folder: Path, pool: ProcessPool) -> None:
    """To the last bit of every value, error and hash; 4 processes are more than some tasks have images."""
    alone = [result.to_json() for result in evaluate(folder)]
    for count in (2, 4):
        ranks = pool.run(_results, count, folder)
        assert all(rank == ranks[0] for rank in ranks)
        for task, expected in zip(ranks[0], alone, strict=True):
            assert task["seconds"] > 0
            if "error" in task:  # says which process failed
                task["error"] = task["error"].split(" (process ")[0]
            for result in (task, expected):
                assert {key: result.pop(key, None) for key in TIMES}.keys() == set(TIMES)
            assert task == expected
            expected |= dict.fromkeys(TIMES, 0.0)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("missing", "dataset folder gone is not in"),
        ("empty", "the dataset is empty"),
        ("all_broken", "none of 2 images can be read; the first is .*ant/000.png"),
        ("few_names", "3 class names for a dataset of 2 classes.*class 0"),
        ("label_beyond", "7 class names, but the entry expects num_classes = 6"),
        ("too_few_images", "41 images in .*wds, split test, but the entry expects num_images = 42"),
        ("one_of_several", "metric 'top1' is for one class per image, and here are several; use mAP"),
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


def test_a_missing_dataset_says_where_it_comes_from(tmp_path: Path) -> None:
    entry = {"type": "webdataset", "path": "gone", "source": "https://example.org", "download": "get {path}"}
    write_catalog(tmp_path / "catalog.json", {"t": entry})
    (result,) = evaluate(tmp_path, "t")
    assert result.error.endswith(f"; it comes from https://example.org; get it with `get {tmp_path / 'gone'}`")


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
    with pytest.raises(UserError, match="prompt_ensemble = 'features'; expected feature or score"):
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
    config, entries = load_evaluation(path)
    results = evaluate_tasks(FakeModel(), entries, config, device="cpu")
    assert [(r.task, r.values) for r in results] == [(r.task, r.values) for r in evaluate(folder, "top1", "pairs")]
    path.write_text(f"catalog_name: {folder / 'catalog.json'}\ntasks: [top1, pair]\n")
    with pytest.raises(UserError, match=r"'pair'.*'pairs'"):
        load_evaluation(path)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    assert len(load_evaluation("config_evals/scenes_online.yaml")[1]) == 4
    assert "imagenet" in [entry.name for entry in load_evaluation("config_evals/llip_online.yaml")[1]]


BROKEN = {
    "image": ("image.bias", "image features", ("top1", "pairs")),
    "words": ("words.weight", "text features", ("top1", "pairs")),
}


@pytest.mark.parametrize("tower", BROKEN)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shortlist", [None, 10])
def test_weights_that_are_not_finite_are_errors_that_name_the_parameter(
    folder: Path, tower: str, value: float, shortlist: int | None
) -> None:
    model = FakeModel()
    name, what, tasks = BROKEN[tower]
    with torch.no_grad():
        model.get_parameter(name)[...] = value
    for result in evaluate(folder, *tasks, model=model, shortlist=shortlist):
        assert result.values == {}
        assert f"{what} are not finite" in result.error
        assert f"parameter {name} are NaN or inf" in result.error


def test_scores_that_are_not_finite_are_an_error(folder: Path) -> None:
    class Divided(FakeModel):
        def similarity(self, h: Tensor, t: Tensor) -> Tensor:
            return super().similarity(h, t) / 0

    for result in evaluate(folder, "top1", "pairs", "map", model=Divided()):
        assert result.values == {}
        assert "scores are not finite for image 0" in result.error


def test_an_input_with_features_that_are_not_finite_is_named(folder: Path) -> None:
    class Overflowing(FakeModel):
        def encode_image(self, images: Tensor) -> Tensor:
            wrong = (images == preprocess(picture(5))).flatten(1).all(dim=1)
            return super().encode_image(images).masked_fill(wrong[:, None, None], torch.inf)

        def encode_text(self, tokens: Tensor) -> Tensor:
            wrong = (tokens == tokenize(["the cow"])).all(dim=1)
            return super().encode_text(tokens).masked_fill(wrong[:, None], self.bad_text)

    model = Overflowing()
    model.bad_text = torch.nan
    assert "not finite for text 'the cow'" in evaluate(folder, "top1", model=model)[0].error
    model.bad_text = 0.0
    for result in evaluate(folder, "top1", "pairs", model=model):
        assert re.search(r"image features are not finite for image .*00005", result.error)
