"""A small text-conditioned model with the calls of `llip.open_clip.model.Llip`, and writers of each on-disk format."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.task_result import TaskResult


def evaluate(
    model: nn.Module, catalog: Path, tasks: Sequence[str] | None = None, **options: object
) -> list[TaskResult]:
    """Evaluate on the tasks of a catalog; `options` are fields of an `EvalConfig` and arguments of `evaluate_tasks`."""
    names = {field.name for field in dataclasses.fields(EvalConfig)} & set(options) - {"cache_dir"}
    config = EvalConfig(**{"workers": 0} | {name: options.pop(name) for name in names})
    arguments = {"device": "cpu", "progress": False} | options
    return evaluate_tasks(model, load_catalog(catalog).select(tasks), config, **arguments)


SIDE, TOKENS, WIDTH, CONTEXT = 8, 3, 16, 32
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230)}


class FakeModel(nn.Module):
    """Linear towers, K tokens, pooling conditioned on the text; its scores are right for no particular reason."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Linear(3 * SIDE * SIDE, TOKENS * WIDTH)
        self.words = nn.Embedding(256, WIDTH)
        self.dropout = nn.Dropout(0.5)  # any evaluation in training mode would show
        self.preprocess_val, self.tokenizer = preprocess, tokenize

    @property
    def pooling(self) -> "FakeModel":
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(self.dropout(images.flatten(1))).unflatten(1, (TOKENS, WIDTH))  # [B, K, D]

    def encode_text(self, tokens: Tensor) -> Tensor:
        places = torch.arange(1, CONTEXT + 1)[:, None]
        return F.normalize((self.words(tokens) * places.to(tokens.device)).sum(dim=1), dim=-1)  # [T, D]

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        weights = torch.einsum("bkd,td->btk", h, t).softmax(dim=-1)
        return F.normalize(torch.einsum("btk,bkd->btd", weights, h), dim=-1)

    def global_feature(self, h: Tensor) -> Tensor:
        return self.contextualize(h, torch.zeros(1, WIDTH))[:, 0]

    def similarity(self, h: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("btd,td->bt", self.contextualize(h, t), t)


def preprocess(image: Image.Image) -> Tensor:
    """PIL image -> [3, SIDE, SIDE] in [-1, 1]."""
    pixels = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def tokenize(texts: list[str]) -> Tensor:
    """Character codes [T, CONTEXT], padded with 0."""
    return torch.tensor([[*text.encode()[:CONTEXT], *[0] * (CONTEXT - len(text.encode()))] for text in texts])


def picture(index: int) -> Image.Image:
    """A random picture that `index` decides."""
    pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_imagefolder(root: Path, classes: list[str], per_class: int) -> None:
    """Write <root>/<class>/<n>.png; image i of the sorted listing is picture(i)."""
    for label, name in enumerate(sorted(classes)):
        (root / name).mkdir(parents=True)
        for n in range(per_class):
            picture(label * per_class + n).save(root / name / f"{n:03d}.png")


def write_wds(root: Path, labels: list[int], classes: list[str], shards: int = 2) -> None:
    """Write the wds_* layout; sample i is picture(i) and lies in shard i * shards // n."""
    for shard in range(shards):
        members: dict[str, bytes | str] = {}
        for i, label in enumerate(labels):
            if i * shards // len(labels) == shard:
                members |= {f"{i:05d}.png": png(picture(i)), f"{i:05d}.cls": str(label)}
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text(str(shards))
    (root / "classnames.txt").write_text("\n".join(classes) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}\nthe {c}\n")


def captions_of(index: int) -> list[str]:
    """One to three captions that `index` decides."""
    return [f"caption {n} of {index * 37 % 101}" for n in range(1 + index % 3)]


def write_retrieval(root: Path, images: int, shards: int = 2) -> None:
    """Write retrieval shards whose captions are in txt (a line each) and in the json field `captions`."""
    for shard in range(shards):
        members: dict[str, bytes | str] = {}
        for i in range(images):
            if i * shards // images == shard:
                captions = captions_of(i)
                members[f"{i:05d}.png"] = png(picture(i))
                members[f"{i:05d}.txt"] = "\n".join(captions) + "\n"
                members[f"{i:05d}.json"] = json.dumps({"captions": captions, "title": captions[0], "bad": 3})
        write_tar(root / "test" / f"{shard}.tar", members)


def write_catalog(path: Path, entries: dict) -> Path:
    path.write_text(json.dumps(entries))
    return path
