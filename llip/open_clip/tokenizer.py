"""Tokenizers: the BPE one that ships with OpenCLIP, or a Hugging Face one from a folder on this machine."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from llip.errors import UserError

Tokenizer = Callable[[list[str]], Tensor]
"""T texts -> token ids [T, context_length]."""


def create_tokenizer(text_cfg: dict[str, Any], folder: str | Path | None = None) -> Tokenizer:
    """Return the tokenizer that a text tower was trained with.

    Args:
        text_cfg: of a resolved architecture: `context_length`, and `hf_tokenizer_name` where it is not OpenCLIP's own.
        folder: of the tokenizer's files, instead of `hf_tokenizer_name`.

    Raises:
        UserError: the folder is not there or holds no tokenizer, the `transformers` package is missing, or the
            vocabulary is larger than the text tower's.
    """
    length = text_cfg["context_length"]
    name = text_cfg.get("hf_tokenizer_name")
    if name is None:
        return _openclip_tokenizer(length)
    path = Path(folder or name).expanduser()
    if not path.is_dir():
        raise UserError(
            f"tokenizer {str(path)!r} is no folder on this machine; give one that holds the tokenizer's files "
            "(tokenizer.json or spiece.model, tokenizer_config.json): tokenizer=FOLDER"
        )
    try:
        tokenizer = HFTokenizer(
            str(path.resolve()),
            context_length=length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            **(text_cfg.get("tokenizer_kwargs") or {}),
            local_files_only=True,
        )
    except ImportError as error:
        raise UserError(
            f"tokenizer {str(path)!r} needs the package transformers: pip install 'llip[transformers]'"
        ) from error
    except Exception as error:  # whatever the library finds wrong with the folder
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    size, vocabulary = len(tokenizer.tokenizer), text_cfg["vocab_size"]
    if size > vocabulary:
        raise UserError(
            f"tokenizer {str(path)!r} has {size} tokens, the text tower only {vocabulary}: it belongs to another model"
        )
    padding, expected = tokenizer.tokenizer.pad_token_id, text_cfg.get("hf_config", {}).get("pad_token_id")
    if expected is not None and padding != expected:  # by which the text tower finds the padding
        raise UserError(f"tokenizer {str(path)!r} pads with token {padding}, the text encoder expects {expected}")
    return tokenizer


@functools.cache  # reading its merges takes 0.2 s
def _openclip_tokenizer(context_length: int) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=context_length)
