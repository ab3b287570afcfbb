"""Tokenizers: the one that ships, and one from a folder, written by the libraries themselves."""

import json
import sys

import open_clip
import pytest
import torch

import llip
from llip.errors import UserError
from llip.open_clip.tokenizer import create_tokenizer
from tests.helpers import TINY_MODEL

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "star", "on", "the", "left"]


def text_cfg(**changes):
    kwargs = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    return {**TINY_MODEL["text_cfg"], "vocab_size": len(WORDS), "hf_tokenizer_name": "org/name", **kwargs, **changes}


@pytest.fixture
def folder(tmp_path):
    """Return a folder as the hub has them: a word-level tokenizer that ends each text as T5's does."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    path = tmp_path / "tokenizer"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**described, "unk_token": "<unk>"}))
    return path


def test_a_folder_gives_the_ids_of_its_words(folder):
    tokenizer = create_tokenizer(text_cfg(), folder)
    ids = tokenizer(["A red star!", "a dog on the left " * 9])
    assert ids.shape == (2, 12)
    assert ids[0].tolist() == [3, 4, 5, 1] + [0] * 8
    assert ids[1].tolist() == [3, 2, 6, 7, 8, 3, 2, 6, 7, 8, 3, 1]


def test_a_tokenizer_of_another_model_is_refused(folder):
    with pytest.raises(UserError, match="has 9 tokens, the text tower only 5"):
        create_tokenizer(text_cfg(vocab_size=5), folder)


def test_model_checkpoint_and_export_bring_the_tokenizer(folder, tmp_path):
    from llip.tools.export.__main__ import export

    (tmp_path / "m.json").write_text(json.dumps({**TINY_MODEL, "text_cfg": text_cfg()}))
    model, _, _ = llip.create_model_and_transforms(str(tmp_path / "m.json"), pool_heads=4, tokenizer=str(folder))
    expected = model.tokenizer(["a red star"])
    assert (
        expected.tolist()
        == llip.get_tokenizer(str(tmp_path / "m.json"), tokenizer=str(folder))(["a red star"]).tolist()
    )
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    assert torch.equal(llip.load_pretrained(tmp_path / "c.pt").tokenizer(["a red star"]), expected)
    export(tmp_path / "c.pt", tmp_path / "out")
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert torch.equal(llip.load_pretrained(tmp_path / "out").tokenizer(["a red star"]), expected)
    with pytest.raises(UserError, match="no folder on this machine"):
        llip.load_pretrained(tmp_path / "c.pt")
    assert torch.equal(
        llip.load_pretrained(tmp_path / "c.pt", tokenizer=str(moved)).tokenizer(["a red star"]), expected
    )
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(theirs(["a red star"]), expected)


def test_a_folder_without_a_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot be read"):
        create_tokenizer(text_cfg(), tmp_path)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'org/name' is no folder.*tokenizer=FOLDER"):
        create_tokenizer(text_cfg())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'llip\[transformers\]'"):
        create_tokenizer(text_cfg(), tmp_path)


def test_the_tokenizer_that_ships_is_openclips():
    ours = create_tokenizer(TINY_MODEL["text_cfg"])(["a cat", "two"])
    assert torch.equal(ours, open_clip.SimpleTokenizer(context_length=12)(["a cat", "two"]))
