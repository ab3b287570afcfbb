"""The index on disk: immutable segments of features, and a json that lists the rows in use.

    index.json          the model's hash, and each image's state, segment and row
    tokens_<n>.npy      mixture tokens [rows, K, D], memory-mapped
    features_<n>.npy    text-independent features [rows, D], for the shortlist

A segment is complete before index.json names it, and index.json is replaced atomically: an interrupted index stays
valid, and the next start resumes it. Segments without rows in use are deleted.

Shapes: K mixture tokens, D embedding width.
"""

import copy
import dataclasses
import hashlib
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llip.clipeval.texts.cache import hash_weights
from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.system.files import atomic_write, write_text
from llip.system.locks import held_lock
from llip.tools.search.files import FileState

FORMAT = 1
INDEX = "index.json"


def hash_model(model: Llip) -> str:
    """Return a hash of everything that decides a model's scores: both towers, the pooling, and their layout."""
    described = copy.deepcopy(model.config)
    described["architecture"].get("text_cfg", {}).pop("hf_tokenizer_name", None)  # a path on this machine
    parts = [json.dumps(described, sort_keys=True)]
    parts += [hash_weights(part) for part in (model.visual, model.text, model.pooling)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Place(NamedTuple):
    """Where an image's features are."""

    segment: int
    row: int


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What `llip.open_model` opened: a path (absolute here) or a name, and the weights that go with a name."""

    model: str
    pretrained: str | None = None

    @classmethod
    def of(cls, model: str, pretrained: str | None) -> "ModelSource":
        """Return the source that queries open from any working folder."""
        return cls(_absolute(model), _absolute(pretrained) if pretrained else None)

    def __str__(self) -> str:
        return repr(self.model) + (f" with {self.pretrained!r}" if self.pretrained else "")


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


@dataclasses.dataclass
class Index:
    """An index in memory; `save` writes it."""

    path: Path
    folder: Path  # of the images, absolute
    source: ModelSource
    model: str  # hash of its weights
    images: dict[str, tuple[FileState, Place]] = dataclasses.field(default_factory=dict)
    damaged: dict[str, tuple[FileState, str]] = dataclasses.field(default_factory=dict)  # with the reason

    @property
    def known(self) -> dict[str, FileState]:
        """The state of every file when it was read."""
        return {path: state for part in (self.images, self.damaged) for path, (state, _) in part.items()}

    def forget(self, path: str) -> None:
        """Remove a file from the index."""
        self.images.pop(path, None)
        self.damaged.pop(path, None)

    def next_segment(self) -> int:
        """Return an unused number of a segment."""
        numbers = [int(file.stem.rsplit("_", 1)[1]) for file in self.path.glob("tokens_*.npy")]
        return max(numbers, default=-1) + 1

    def add_segment(self, tokens: np.ndarray, features: np.ndarray) -> int:
        """Write a segment [n, K, D] and [n, D] and return its number."""
        number = self.next_segment()
        for kind, values in (("features", features), ("tokens", tokens)):
            target = self.path / f"{kind}_{number}.npy"
            with atomic_write(target) as draft, draft.open("wb") as file:
                np.save(file, values, allow_pickle=False)
        return number

    def segment(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [rows, K, D] and features [rows, D] of a segment, memory-mapped.

        Raises:
            UserError: a file is missing or damaged.
        """
        try:
            tokens, features = (
                np.load(self.path / f"{kind}_{number}.npy", mmap_mode="r", allow_pickle=False)
                for kind in ("tokens", "features")
            )
            return tokens, features
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"index {str(self.path)!r}: segment {number} is missing or damaged ({error}); delete the folder and "
                "index again"
            ) from error

    def save(self) -> None:
        """Write index.json, then delete segments without rows in use.

        The folder is written relative to an index inside it, so that both can be moved together.
        """
        inside = self.path.resolve().is_relative_to(self.folder)
        record = {
            "format": FORMAT,
            "folder": os.path.relpath(self.folder, self.path.resolve()) if inside else str(self.folder),
            "checkpoint": self.source.model,
            "pretrained": self.source.pretrained,
            "model": self.model,
            "images": {path: [*state, *place] for path, (state, place) in sorted(self.images.items())},
            "damaged": {path: [*state, reason] for path, (state, reason) in sorted(self.damaged.items())},
        }
        write_text(self.path / INDEX, json.dumps(record))
        used = {place.segment for _, place in self.images.values()}
        for file in [*self.path.glob("tokens_*.npy"), *self.path.glob("features_*.npy")]:
            if int(file.stem.rsplit("_", 1)[1]) not in used:
                file.unlink(missing_ok=True)


def open_index(path: Path) -> Index:
    """Read an index.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    file = path / INDEX
    if not file.is_file():
        raise UserError(f"no index in {str(path)!r}; make one with: llip search index DIR --checkpoint MODEL")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = record["format"]
        if version == FORMAT:
            return Index(
                path=path,
                folder=Path(path, record["folder"]).resolve(),
                source=ModelSource(record["checkpoint"], record.get("pretrained")),
                model=record["model"],
                images={name: (FileState(*row[:2]), Place(*row[2:])) for name, row in record["images"].items()},
                damaged={name: (FileState(*row[:2]), row[2]) for name, row in record["damaged"].items()},
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"index {str(file)!r} is damaged ({error}); delete the folder and index again") from error
    raise UserError(f"index {str(file)!r} has format {version!r}, expected {FORMAT}; delete the folder and index again")


def check_model(index: Index, weights: str, source: ModelSource) -> None:
    """Raise a `UserError` unless a model, by the hash of its weights, is the one that the index was made with."""
    if weights != index.model:
        raise UserError(
            f"index {str(index.path)!r} was made with other weights ({index.source}, {index.model[:12]}) than "
            f"those of {source} ({weights[:12]}); scores of two models do not mix: use that model, or another --out"
        )


def lock(path: Path) -> AbstractContextManager[None]:
    """Return a context that locks an index for writing.

    Raises:
        UserError: another process holds the lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    return held_lock(path / "lock", f"index {str(path)!r}", "choose another --out", patience=0)
