"""For a plain CLIP the scores are those of OpenCLIP's own zero-shot classifier on the same weights."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.clipeval import zero_shot
from llip.clipeval.labels import Labels, TextSource
from llip.clipeval.zero_shot import Scorer, class_features, class_scores


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
    features = class_features(scorer, labels, range(len(names)), "feature")
    scores = class_scores(scorer, scorer.encode_images(images), features)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(scores.argmax(dim=1), expected.argmax(dim=1))


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
    for ensemble, queries in (("feature", 1), ("score", 3)):
        monkeypatch.setattr(zero_shot, "TEXT_BATCH", 512)
        expected = zero_shot.class_features(scorer, labels, range(7), ensemble)
        assert expected.shape == (7, queries, 32)
        for at_once in (1, 2, 7):  # also fewer than one class has prompts, and not a divisor
            monkeypatch.setattr(zero_shot, "TEXT_BATCH", at_once)
            found = zero_shot.class_features(scorer, labels, range(7), ensemble)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
