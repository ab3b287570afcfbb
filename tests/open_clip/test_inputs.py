"""What a notebook may do to a model: other dtypes of weights and features work, wrong inputs are one message."""

import numpy as np
import pytest
import torch
from PIL import Image

import llip
from llip.errors import UserError

POOLINGS = ["first", "mean", "learned", "text", "flair"]


def build(tiny_model, pooling="text"):
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, mixture_tokens=3, pooling=pooling, pool_heads=4)
    return model.eval()


def inputs(model, texts=("a cat", "two dogs here", "no")):
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32), model.tokenizer(list(texts))


@torch.no_grad()
def features(model, texts=("a cat", "two dogs here", "no")):
    images, tokens = inputs(model, texts)
    return model.encode_image(images), model.encode_text(tokens)


def answers(model, h, t):
    return {
        "similarity": model.similarity(h, t),
        "contextualize": model.contextualize(h, t),
        "mixture_weights": model.mixture_weights(h, t),
    }


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_dtype(tiny_model, pooling, dtype):
    model = build(tiny_model, pooling)
    expected = answers(model, *features(model))
    model.to(dtype)
    with torch.no_grad():
        h, t = features(model)
        result = answers(model, h, t)
    for name, value in result.items():
        assert value.dtype in (torch.float32, dtype), name  # mixture weights of fixed ones are as they are kept
        tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
        torch.testing.assert_close(value.float(), expected[name].float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_another_dtype(tiny_model, pooling, dtype):
    model = build(tiny_model, pooling)
    h, t = features(model)
    for changed in ((h.to(dtype), t), (h, t.to(dtype)), (h.to(dtype), t.to(dtype))):
        with torch.no_grad():
            result, expected = answers(model, *changed), answers(model, *(x.float() for x in changed))
        for name, value in result.items():
            torch.testing.assert_close(value.float(), expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("texts", [3, 400])  # formed feature by feature, and in tiles
def test_low_precision_models_still_train(tiny_model, texts):
    model = build(tiny_model).to(torch.bfloat16)
    images, tokens = inputs(model, [f"text {number}" for number in range(texts)])
    model(images, tokens).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if not name.startswith("logit")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_wrong_images(tiny_model):
    model = build(tiny_model)
    picture = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    for images, message in (
        ([picture, picture], r"got list.*preprocess_val"),
        (picture, r"got Image.*preprocess_val"),
        (np.zeros((2, 3, 32, 32), np.float32), "got ndarray"),
        (torch.zeros(3, 32, 32), r"images\[None\]"),
        (torch.zeros(2, 1, 32, 32), r"expected \[B, 3, H, W\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"model\.normalise"),
        (torch.zeros(2, 3, 64, 64), "expected 32 x 32 pixels"),
        (torch.zeros(0, 3, 32, 32), "got none"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode_image(images)


def test_wrong_texts(tiny_model):
    model = build(tiny_model)
    for tokens, message in (
        (["a cat"], r"got list.*model\.tokenizer"),
        ("a cat", "got str"),
        (torch.ones(12).long(), r"expected token ids \[T, C\]"),
        (torch.ones(2, 12), r"expected token ids \[T, C\]"),
        (torch.ones(2, 77).long(), "at most 12 tokens"),
        (torch.ones(0, 12).long(), "got none"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode_text(tokens)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_wrong_features(tiny_model, pooling):
    model = build(tiny_model, pooling)
    h, t = features(model)
    for wrong, message in (
        ((h[:, 0], t), r"h: expected features \[B, K, D\] from encode_image"),
        ((h, t[0]), r"t: expected features \[T, D\] from encode_text"),
        ((h[:, :2], t), r"expected \[B, 3, D\]"),
        ((h, t[:, :8]), r"expected \[B, 3, D\]"),
        ((h[:0], t), "expected one or more images"),
        ((h, t[:0]), "expected one or more texts"),
        ((h, 2.8 * t), "unit norm, got norms from 2.8"),
        ((h, "a cat"), "got str"),
        ((t, h), "h: expected features"),
    ):
        for call in (model.similarity, model.contextualize, model.mixture_weights):
            with pytest.raises(UserError, match=message):
                call(*wrong)
