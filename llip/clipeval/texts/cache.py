"""Class text features on disk: a checkpoint's 1,000 classes x 80 prompts are encoded once, not once per evaluation.

A file's name is the hash of everything that decides its numbers: the weights and layout of the text tower, the texts
that are averaged, token ids, precision and kind of device. So a file is never stale, and deleting the folder costs only
time. Files are plain arrays in a zip, whose checksums reveal damage; they are read without unpickling.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llip.clipeval.scorer import Scorer
from llip.system.files import atomic_write

FORMAT = 3
"""Part of the name; to be increased with every change of the files' meaning."""

_PROBE = 8  # prompts whose token ids go into the name: they distinguish tokenizers
logger = logging.getLogger(__name__)


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of layout, parameters and buffers of what encodes text: `model.text`, else the whole model."""
    module = getattr(model, "text", model)
    digest = hashlib.sha256(repr(module).encode())  # activations and epsilons are in the layout
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class TextCache:
    """Text features of one model's classes in one folder; several processes and programs may share the folder."""

    folder: Path
    weights: str

    @classmethod
    def open(cls, folder: Path, model: nn.Module) -> "TextCache":
        """Return the cache for a model's current weights; the folder is created with the first file."""
        return cls(folder, hash_weights(model))

    def path(self, scorer: Scorer, texts: Sequence[Sequence[str]]) -> Path:
        """Return the file of the features of queries, given the texts of each."""
        probe = scorer.tokenizer([text for some in texts[:_PROBE] for text in some][:_PROBE]).tolist()
        where = [scorer.device.type, str(scorer.autocast_dtype)]
        identity = json.dumps([FORMAT, self.weights, *where, probe, texts])
        return self.folder / f"text_{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"

    @staticmethod
    def load(path: Path, queries: int) -> Tensor | None:
        """Return features [Q, D], or None if the file is missing or, with a warning, unusable."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                features = torch.from_numpy(stored["features"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            logger.warning("cached text features %s are damaged (%s); encoding the texts again", path, error)
            return None
        if features.dtype != torch.float32 or features.dim() != 2 or len(features) != queries:
            logger.warning("cached text features %s are not of %d texts; encoding the texts again", path, queries)
            return None
        if not features.isfinite().all():
            logger.warning("cached text features %s are not finite; encoding the texts again", path)
            return None
        return features

    @staticmethod
    def store(path: Path, features: Tensor) -> None:
        """Write features [Q, D] in one atomic step; a folder that cannot be written costs a warning, not a task."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez(file, features=features.cpu().numpy())
        except OSError as error:
            logger.warning("text features cannot be cached in %s: %s", path.parent, error.strerror)
