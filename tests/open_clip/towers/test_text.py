"""Hugging Face text encoders against `transformers`' own outputs; encoders are random, written by the tests."""

import json
import shutil
import socket
import sys

import pytest
import torch

import llip
from llip.errors import UserError
from llip.open_clip.towers.locks import lock_towers
from llip.open_clip.towers.text import frozen_text_features, text_from_features
from llip.tools.export.__main__ import export
from tests.helpers import BACKBONE_MODEL, TINY_MODEL, write_hf_encoder

transformers = pytest.importorskip("transformers")

CAPTIONS = ["picture number 7 of all", "two of them", "one"]
KINDS = ("bert", "xlm-roberta", "mt5")


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tmp_path_factory):
    return write_hf_encoder(tmp_path_factory.mktemp("encoders") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_hf_encoder(tmp_path_factory.mktemp("encoders") / "bert", "bert")


def model_file(folder, encoder, **text):
    cfg = {"hf_model_name": str(encoder), "context_length": 16, "hf_proj_type": "linear", **text}
    path = folder / "m.json"
    path.write_text(json.dumps({**TINY_MODEL, "text_cfg": cfg}))
    return str(path)


def create(path, **options):
    return llip.create_model_and_transforms(path, pool_heads=4, **options)[0].eval()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@torch.no_grad()
def test_mean_pooling_is_of_the_encoders_own_outputs(encoder, tmp_path, no_network):
    model = create(model_file(tmp_path, encoder))
    own = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    own = own.encoder if own.config.is_encoder_decoder else own
    pooled = []
    for caption in CAPTIONS:  # one by one, without padding
        hidden = own(input_ids=tokenizer(caption, return_tensors="pt").input_ids).last_hidden_state
        pooled.append(hidden[0].mean(0))
    expected = torch.stack(pooled)
    tokens = model.tokenizer(CAPTIONS)
    assert tokens.shape == (3, 16)
    features = frozen_text_features(model.text, tokens)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    projected = expected @ model.text.proj.weight.T
    torch.testing.assert_close(model.encode_text(tokens), torch.nn.functional.normalize(projected, dim=-1))
    torch.testing.assert_close(
        model.encode_text_features(features.half()), model.encode_text(tokens), atol=2e-3, rtol=0
    )
    assert not any(name.startswith("text.transformer.decoder") for name in model.state_dict())


@torch.no_grad()
def test_class_pooling_and_the_mlp(bert, tmp_path):
    model = create(model_file(tmp_path, bert, hf_pooler_type="cls_pooler", hf_proj_type="mlp"))
    tokens = model.tokenizer(CAPTIONS)
    own = transformers.AutoModel.from_pretrained(bert).eval()
    pooled = own(input_ids=tokens, attention_mask=(tokens != 0).long()).pooler_output
    features = frozen_text_features(model.text, tokens)
    torch.testing.assert_close(features, pooled, atol=1e-5, rtol=1e-5)
    first, _, second = model.text.proj
    hidden = torch.nn.functional.gelu(features @ first.weight.T)
    torch.testing.assert_close(text_from_features(model.text, features), hidden @ second.weight.T)
    plain = create(model_file(tmp_path, bert, hf_pooler_type="cls_last_hidden_state_pooler"))
    hidden = own(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]
    torch.testing.assert_close(frozen_text_features(plain.text, tokens), hidden, atol=1e-5, rtol=1e-5)
    assert plain.text.transformer.pooler is None


def test_every_parameter_is_trained_and_a_locked_encoder_is_not(encoder, tmp_path):
    model = create(model_file(tmp_path, encoder))
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenizer(CAPTIONS)
    model.train()(images, tokens).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["logit_scale", "logit_bias"]
    lock_towers(model, False, "encoder")
    assert {name for name, p in model.text.named_parameters() if p.requires_grad} == {"proj.weight"}
    torch.testing.assert_close(model.train().encode_text(tokens), model.encode_text(tokens))  # no dropout
    model.text.set_grad_checkpointing()
    model.text.set_grad_checkpointing(False)


@torch.no_grad()
def test_a_checkpoint_and_an_export_need_no_encoder(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    model = create(model_file(tmp_path, "encoder"))  # relative to the json
    tokens = model.tokenizer(CAPTIONS)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").rename(tmp_path / "config.json")
    tokenizer = shutil.move(folder, tmp_path / "moved")
    again = llip.load_pretrained(tmp_path / "c.pt", tokenizer=str(tokenizer))
    torch.testing.assert_close(again.encode_text(again.tokenizer(CAPTIONS)), model.encode_text(tokens))


@pytest.mark.slow  # torch.export traces three programs
def test_an_encoder_becomes_a_program(bert, tmp_path):
    model = create(model_file(tmp_path, bert))
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    outcome = export(tmp_path / "c.pt", tmp_path / "out", torch_export=True)
    assert outcome["checks"]["text_encoder.pt2"] < 1e-4
    assert "Hugging Face text encoder" in outcome["why_not"]
    again = llip.load_pretrained(tmp_path / "out")
    tokens = again.tokenizer(CAPTIONS)
    torch.testing.assert_close(again.encode_text(tokens), model.encode_text(tokens))


@torch.no_grad()
def test_openclips_own_text_tower_in_two_steps(tiny_model):
    model = create(tiny_model)
    tokens = llip.get_tokenizer(context_length=12)(CAPTIONS)
    features = frozen_text_features(model.text, tokens)
    assert features.shape == (3, TINY_MODEL["text_cfg"]["width"])
    torch.testing.assert_close(features @ model.text.text_projection, model.text(tokens))
    torch.testing.assert_close(model.encode_text_features(features), model.encode_text(tokens))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"hf_model_name": "nowhere"}, r"nowhere' is no folder on this machine; `hf download"),
        ({"hf_pooler_type": "max_pooler"}, r"hf_pooler_type = 'max_pooler'; one of mean_pooler"),
        ({"hf_proj_type": "none"}, r"hf_proj_type = 'none'; one of linear, mlp"),
        ({"context_length": 21}, r"context_length 21.*has 20 positions; set context_length=20 or less"),
        ({"hf_model": "x"}, r"unknown key 'text_cfg.hf_model'.*'hf_model_name'"),
    ],
)
def test_mistakes_are_named(bert, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        create(model_file(tmp_path, bert, **text))


def test_a_folder_that_is_no_encoder(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "e")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"brings no weights.*hf_model_pretrained to false"):
        create(model_file(tmp_path, folder))
    create(model_file(tmp_path, folder, hf_model_pretrained=False))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "telepathy"}))
    with pytest.raises(UserError, match=r"model_type 'telepathy' is not in transformers"):
        create(model_file(tmp_path, folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"text encoder's config .* cannot be read"):
        create(model_file(tmp_path, folder))


def test_without_the_package_one_message(bert, tmp_path, monkeypatch):
    path = model_file(tmp_path, bert)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'llip\[transformers\]'"):
        create(path)


def test_both_towers_may_come_from_elsewhere(bert, tmp_path):
    text = {"hf_model_name": str(bert), "context_length": 16}
    (tmp_path / "m.json").write_text(json.dumps({**BACKBONE_MODEL, "text_cfg": text}))
    model = create(str(tmp_path / "m.json"), mixture_tokens=2)
    scores = model(torch.randn(2, 3, 64, 64), model.tokenizer(CAPTIONS))
    assert scores.shape == (2, 3)
    assert all(name.startswith("text.transformer.") for name in model.load_report.loaded)
