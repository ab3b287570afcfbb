"""For a plain CLIP the scores are those of OpenCLIP's own zero-shot classifier on the same weights."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llip
from llip.clipeval import scorer as scoring
from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.classification import predict
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.loading import image_batches
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_run import TaskError, TaskRun
from llip.clipeval.texts import classifier as classifiers
from llip.clipeval.texts.classifier import Classifier, build_classifier
from llip.clipeval.texts.labels import Labels
from llip.clipeval.texts.sources import TextSource
from tests.clipeval.fakes import evaluate, write_catalog, write_imagefolder
from tests.helpers import TINY_MODEL


class PlainClip(nn.Module):
    """An OpenCLIP model with the calls that the evaluation makes; one token per image."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def encode_image(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images)[:, None]  # [B, 1, D]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=True)

    def similarity(self, h: Tensor, t: Tensor) -> Tensor:
        return F.normalize(h[:, 0], dim=-1) @ t.T


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=24, vocab_size=49408, width=32, heads=2, layers=2)
    return open_clip.CLIP(32, vision, text).eval()


@torch.no_grad()
def test_scores_equal_open_clips(clip: open_clip.CLIP) -> None:
    names, templates = [f"class {word}" for word in "abcdefghijklm"], ["a photo of a {}.", "the {}.", "{} outside"]
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    images = torch.randn(9, 3, 16, 16)
    weights = open_clip.build_zero_shot_classifier(clip, tokenizer, names, templates)  # [D, C]
    expected = clip.encode_image(images, normalize=True) @ weights

    labels = Labels(tuple(names), tuple(template.replace("{}", "{c}") for template in templates))
    scorer = Scorer(PlainClip(clip), lambda image: image, tokenizer, torch.device("cpu"))
    scores = classifier_of(scorer, labels).scores(scorer, scorer.encode_images(images))
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(scores.argmax(dim=1), expected.argmax(dim=1))


NAMES = [f"thing {word}" for word in "abcdefghijk"]
TEMPLATES = ["a photo of a {}.", "the {}.", "{} outside"]
LABELS = Labels(tuple(NAMES), tuple(template.replace("{}", "{c}") for template in TEMPLATES))


def classifier_of(scorer: Scorer, labels: Labels, ensemble: str = "feature") -> Classifier:
    return build_classifier(TaskRun(scorer, EvalConfig(prompt_ensemble=ensemble)), labels)


def scorer_of(model: nn.Module) -> Scorer:
    return Scorer(model, model.preprocess_val, model.tokenizer, torch.device("cpu"))


def tiny(folder: Path, **options: object) -> nn.Module:
    torch.manual_seed(0)
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    model, _, preprocess = llip.create_model_and_transforms(str(path), **options)
    model.preprocess_val, model.tokenizer = preprocess, llip.get_tokenizer(context_length=12)
    return model.eval()


@torch.no_grad()
def test_our_own_clip_is_open_clips_image_for_image(tmp_path: Path) -> None:
    """pooling=first on the same weights: from image files, through the whole evaluation."""
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(**TINY_MODEL).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours = tiny(tmp_path, mixture_tokens=1, pooling="first", pretrained=str(tmp_path / "clip.pt"))
    write_imagefolder(tmp_path / "set", NAMES, 3)
    source = load_catalog(
        write_catalog(tmp_path / "c.json", {"t": {"type": "imagefolder", "path": "set", "prompts": TEMPLATES}})
    )["t"].data.open()

    weights = open_clip.build_zero_shot_classifier(theirs, ours.tokenizer, NAMES, TEMPLATES)  # [D, C]
    transform = open_clip.image_transform(32, is_train=False)
    images = torch.stack([transform(source.load(i)[0].convert("RGB")) for i in range(len(source))])
    expected = theirs.encode_image(images, normalize=True) @ weights

    scorer = scorer_of(ours)
    (batch,) = image_batches(source, ours.preprocess_val, range(len(source)), 64, workers=0)
    found = predict(scorer, batch, scorer.encode_images(batch.images), classifier_of(scorer, LABELS), keep_scores=True)
    torch.testing.assert_close(found.scores, expected, atol=2e-6, rtol=0)
    assert torch.equal(found.top[:, 0], expected.argmax(dim=1))
    assert len(found.top[:, 0].unique()) > 1  # else the comparison says little
    (result,) = evaluate(ours, tmp_path / "c.json")
    right = expected.argmax(dim=1) == torch.tensor(source.targets())
    assert (result.outcomes.ranks == 0).tolist() == right.tolist()
    assert result.value == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize("ensemble", ["feature", "score"])
@pytest.mark.parametrize(("pooling", "attended"), [("text", "mixture"), ("flair", "patches")])
@torch.no_grad()
def test_llip_equals_a_dense_loop_over_contextualize(
    tmp_path: Path, pooling: str, attended: str, ensemble: str
) -> None:
    model = tiny(tmp_path, mixture_tokens=4, pooling=pooling, pair_tokens=attended, pool_heads=2)
    images = torch.randn(6, 3, 32, 32)
    h = model.encode_image(images)
    expected = torch.empty(6, len(NAMES))
    for label, name in enumerate(NAMES):
        texts = model.encode_text(model.tokenizer([template.format(name) for template in TEMPLATES]))
        queries = texts if ensemble == "score" else F.normalize(texts.mean(dim=0, keepdim=True), dim=-1)
        for image in range(6):
            each = [(model.contextualize(h[[image]], query[None])[0, 0] @ query).item() for query in queries]
            expected[image, label] = sum(each) / len(each)
    scorer = scorer_of(model)
    scores = classifier_of(scorer, LABELS, ensemble).scores(scorer, scorer.encode_images(images))
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)
    assert torch.equal(scores.argmax(dim=1), expected.argmax(dim=1))


@torch.no_grad()
def test_synonyms_are_a_mean_over_names_and_prompts(clip: open_clip.CLIP) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    scorer = Scorer(PlainClip(clip), lambda image: image, tokenizer, torch.device("cpu"))
    labels = Labels((("cat", "kitten", "tom"), ("dog", "hound"), "cow"), ("a {c}", "the {c}"))
    features = classifier_of(scorer, labels).features
    for row, names in zip(features, (("cat", "kitten", "tom"), ("dog", "hound"), ("cow",)), strict=True):
        prompts = [f"{word} {name}" for word in ("a", "the") for name in names]
        texts = clip.encode_text(tokenizer(prompts), normalize=True)
        torch.testing.assert_close(row, F.normalize(texts.mean(dim=0), dim=-1), atol=1e-6, rtol=0)


class CountingClip(PlainClip):
    """Counts the texts it encodes."""

    texts = 0

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts += len(tokens)
        return super().encode_text(tokens)


@torch.no_grad()
def test_each_distinct_prompt_is_encoded_and_kept_once(clip: open_clip.CLIP, monkeypatch) -> None:
    """1,000 classes of 1 to 9 synonyms, some in two classes; scores are those of a loop over classes."""
    names = [[f"{label % 990} {i}" for i in range(1 + label % 9)] for label in range(1000)]
    labels = Labels(tuple(map(tuple, names)), ("a {c}", "the {c}"))
    model = CountingClip(clip)
    scorer = Scorer(model, lambda image: image, open_clip.SimpleTokenizer(context_length=24), torch.device("cpu"))
    monkeypatch.setattr(classifiers, "SCORES_AT_ONCE", 20_000)  # fewer than three images
    classifier = classifier_of(scorer, labels, "score")
    distinct = {f"{word} {name}" for word in ("a", "the") for some in names for name in some}
    assert model.texts == len(classifier.features) == len(distinct)
    h = scorer.encode_images(torch.randn(3, 3, 16, 16))
    scores = classifier.scores(scorer, h)
    for label in (0, 8, 13, 990, 998, 999):
        texts = scorer.encode_texts([f"{word} {name}" for word in ("a", "the") for name in names[label]])
        expected = F.normalize(h[:, 0].double(), dim=-1) @ texts.double().T
        torch.testing.assert_close(scores[:, label].double(), expected.mean(dim=1), atol=1e-6, rtol=0)


def test_too_many_prompts_to_score_are_refused(clip: open_clip.CLIP, monkeypatch) -> None:
    monkeypatch.setattr(classifiers, "MAX_QUERIES", 32)
    with pytest.raises(TaskError, match=r"scores each image against 33 texts, at most 32; use 'feature'"):
        classifier_of(Scorer(PlainClip(clip), None, None, torch.device("cpu")), LABELS, "score")


def test_named_sources_are_open_clips() -> None:
    names = TextSource.parse("open_clip:imagenet", Path()).read(None, "classnames")
    prompts = TextSource.parse("open_clip:openai_imagenet", Path()).read(None, "prompts")
    assert (len(names), len(prompts)) == (1000, 80)
    assert "a bad photo of a {c}." in prompts
    assert len(TextSource.parse("open_clip:simple", Path()).read(None, "prompts")) == 7


@torch.no_grad()
def test_features_do_not_depend_on_how_many_texts_go_at_once(clip: open_clip.CLIP, monkeypatch) -> None:
    labels = Labels(tuple(f"class {word}" for word in "abcdefg"), ("a {c}", "the {c}", "{c} outside"))
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    scorer = Scorer(PlainClip(clip), lambda image: image, tokenizer, torch.device("cpu"))
    for ensemble, queries in (("feature", 7), ("score", 21)):
        monkeypatch.setattr(scoring, "TEXT_BATCH", 512)
        expected = classifier_of(scorer, labels, ensemble).features
        assert expected.shape == (queries, 32)
        for at_once in (1, 2, 7):  # also fewer than one class has prompts, and not a divisor
            monkeypatch.setattr(scoring, "TEXT_BATCH", at_once)
            features = classifier_of(scorer, labels, ensemble).features
            torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-5)
