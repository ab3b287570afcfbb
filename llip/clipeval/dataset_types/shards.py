"""Tar shards in the layout of the clip-benchmark `wds_*` sets, for classification and for retrieval.

    <path>/<split>/0.tar 1.tar ...  and optionally nshards.txt (split may also name one tar, or be a pattern of tars)
    <path>/classnames.txt, <path>/zeroshot_classification_templates.txt ({c} stands for the class)

A sample is the members `key.<extension>` of one shard. Shards are indexed by their headers, so images are read by
position; labels and captions (small) are read while indexing, so that missing ones are reported before scoring starts.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from llip.clipeval.datasets import DatasetSpec, ImageSource, dataset_type, read_text, require_folder
from llip.clipeval.metrics import RETRIEVAL
from llip.data.tar_reader import split_name
from llip.errors import UserError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ShardSample:
    """One sample: its shard, its key, and extension -> (offset, size) of its members in the shard."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        offset, size = self.members[extension]
        with self.shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    @property
    def image_key(self) -> str | None:
        return next((key for key in IMAGE_KEYS if key in self.members), None)

    @property
    def name(self) -> str:
        return f"{self.shard}:{self.key}"


class ShardImages(ImageSource):
    """Images in tar shards, each with a target (a label, or captions)."""

    def __init__(self, samples: Sequence[ShardSample], targets: Sequence[Any]) -> None:
        self._samples, self._targets = samples, targets

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._samples[index].name

    def targets(self) -> Sequence[Any]:
        return self._targets

    def load(self, index: int) -> tuple[Image.Image, Any]:
        sample = self._samples[index]
        if sample.image_key is None:
            raise ValueError(f"no image; its keys are {', '.join(sorted(sample.members))}")
        with Image.open(io.BytesIO(sample.read(sample.image_key))) as image:
            image.load()
        return image, self._targets[index]


@dataset_type("webdataset")
class WebDataset(DatasetSpec):
    """Classification shards: an image and its label under `label_key`.

    `cls` (or another key) is a class number as text. `npy` is a vector of zeros and ones, one per class: an image may
    be of several classes.
    """

    path: Path
    split: str = "test"
    label_key: str = "cls"

    def open(self) -> ShardImages:
        samples = index_shards(require_folder(self.path) / self.split)
        source = ShardImages(samples, [self._label(sample) for sample in samples])
        source.multi_label = self._multi_label
        source.classnames = _read_lines(self.path / "classnames.txt")
        source.templates = _read_lines(self.path / "zeroshot_classification_templates.txt")
        return source

    def _label(self, sample: ShardSample) -> int | tuple[int, ...]:
        _require_keys(sample, self.label_key)
        data = sample.read(self.label_key)
        if self._multi_label:
            return _ones(data, f"sample {sample.name}: {self.label_key}")
        text = data.decode(errors="replace").strip()
        if not re.fullmatch(r"\d+", text):
            raise UserError(f"sample {sample.name}: {self.label_key} is {text[:40]!r}, expected a class number from 0")
        return int(text)

    @property
    def _multi_label(self) -> bool:
        return self.label_key == "npy"


def _ones(data: bytes, where: str) -> tuple[int, ...]:
    """Return the positions at which a stored vector is 1."""
    try:
        vector = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{where} cannot be read without unpickling: {error}") from error
    if vector.ndim != 1 or not np.isin(vector, (0, 1)).all():
        raise UserError(f"{where} is {vector.dtype} of shape {vector.shape}; expected a vector of zeros and ones")
    return tuple(np.flatnonzero(vector).tolist())


@dataset_type("retrieval")
class Retrieval(DatasetSpec):
    """Retrieval shards: an image and its captions under `caption_key`.

    `txt` holds one caption per line; `json.FIELD` is a field of the sample's json, a string or a list of strings.
    """

    path: Path
    split: str = "test"
    caption_key: str = "txt"
    kind: ClassVar[str] = RETRIEVAL

    def open(self) -> ShardImages:
        samples = index_shards(require_folder(self.path) / self.split)
        return ShardImages(samples, [self._captions(sample) for sample in samples])

    def _captions(self, sample: ShardSample) -> tuple[str, ...]:
        extension, _, field = self.caption_key.partition(".")
        _require_keys(sample, extension)
        try:
            text = sample.read(extension).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"sample {sample.name}: its {extension} is not UTF-8 text: {error}") from error
        captions: Any = text.splitlines()
        if field:
            try:
                captions = json.loads(text)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"sample {sample.name}: no field {field!r} in its {extension}: {text[:80]!r}"
                ) from error
            captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"sample {sample.name}: {self.caption_key} is {captions!r:.80}, expected strings")
        captions = tuple(caption.strip() for caption in captions if caption.strip())
        if not captions:
            raise UserError(f"sample {sample.name}: {self.caption_key} holds no caption")
        return captions


def index_shards(folder: Path) -> list[ShardSample]:
    """Return the samples of all `*.tar` in `folder`, in order; `folder` may also be one tar, or a pattern of tars.

    Raises:
        UserError: no shards, another number than in nshards.txt, an unreadable shard, or no sample with an image.
    """
    pattern = "*.tar"
    if folder.suffix == ".tar":
        folder, pattern = folder.parent, folder.name
    shards = sorted(require_folder(folder).glob(pattern), key=_natural)
    if not shards:
        listing = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"folder {folder} has no shard {pattern}; it holds {listing}")
    declared = folder / "nshards.txt"
    if pattern == "*.tar" and declared.is_file() and declared.read_text().strip() != str(len(shards)):
        raise UserError(f"{declared} has {declared.read_text().strip()!r}, but {folder} has {len(shards)} .tar shards")
    samples = [sample for shard in shards for sample in _index_shard(shard)]
    if samples and not any(sample.image_key for sample in samples):
        keys = ", ".join(sorted({key for sample in samples[:100] for key in sample.members}))
        raise UserError(f"no sample in {folder} has an image ({', '.join(IMAGE_KEYS)}); keys found: {keys}")
    return samples


def _index_shard(shard: Path) -> Iterator[ShardSample]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                parts = split_name(info.name) if info.isfile() else None
                if parts is None:
                    continue
                key, extension = parts
                members = samples.setdefault(key, {})
                if extension in members:
                    raise UserError(f"shard {shard} has two members called {info.name}")
                members[extension] = (info.offset_data, info.size)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {shard} cannot be read: {error}; expected an uncompressed tar") from error
    for key, members in samples.items():
        yield ShardSample(shard, key, members)


def _check_end(shard: Path, position: int) -> None:
    """Refuse a shard that does not end where reading stopped: tarfile takes a broken header for the end."""
    with shard.open("rb") as file:
        file.seek(position)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise UserError(f"shard {shard} is damaged at byte {position}, the rest cannot be read; write it again")


def _require_keys(sample: ShardSample, key: str) -> None:
    if key not in sample.members:
        raise UserError(f"sample {sample.name} has no {key!r}; its keys are {', '.join(sorted(sample.members))}")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which 10.tar follows 9.tar."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _read_lines(path: Path) -> list[str] | None:
    return [line for line in read_text(path).splitlines() if line.strip()] if path.is_file() else None
