"""From an image source to batches of tensors: decoding in data workers; unreadable images are counted and named."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llip.clipeval.datasets import ImageSource
from llip.errors import UserError
from llip.open_clip.pixels import to_rgb
from llip.system.exit_with_parent import held_signals, serve_parent

Preprocess = Callable[[Image.Image], Tensor]

WORKER_TIMEOUT = 300
"""Seconds without a batch from a data worker after which the task fails."""


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be decoded."""

    index: int
    name: str
    reason: str


NAMED_UNREADABLE = 20
"""How many unreadable images a result names; it counts all of them."""


def describe_skipped(unreadable: Sequence[Unreadable], images: int) -> dict[str, Any]:
    """Return the fields of a result about unreadable images, given those of all processes.

    Raises:
        UserError: none of the dataset's images can be read.
    """
    ordered = sorted(unreadable, key=lambda item: item.index)
    if len(ordered) == images:
        first = ordered[0]
        raise UserError(f"none of {images} images can be read; the first is {first.name}: {first.reason}")
    named = tuple(f"{item.name}: {item.reason}" for item in ordered[:NAMED_UNREADABLE])
    return {"skipped": len(ordered), "skipped_images": named}


@dataclass(frozen=True)
class ImageBatch:
    """Images [B, 3, H, W], their targets and indices in the dataset; and the unreadable ones."""

    images: Tensor
    targets: list[Any]
    indices: list[int]
    unreadable: list[Unreadable]


class _Decoded(Dataset):
    def __init__(self, source: ImageSource, preprocess: Preprocess, indices: Sequence[int]) -> None:
        self.source, self.preprocess, self.indices = source, preprocess, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor, Any] | Unreadable:
        index = self.indices[position]
        try:
            image, target = self.source.load(index)
            image = to_rgb(image)
        except Exception as error:  # PIL raises a dozen kinds for broken files
            return Unreadable(index, self.source.name(index), f"{type(error).__name__}: {error}")
        return index, self.preprocess(image), target


def _collate(items: list[tuple[int, Tensor, Any] | Unreadable]) -> ImageBatch:
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0)
    return ImageBatch(images, [target for *_, target in good], [index for index, *_ in good], unreadable)


def image_batches(
    source: ImageSource, preprocess: Preprocess, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[ImageBatch]:
    """Yield the images `indices` of `source` in that order.

    Args:
        batch_size: images per batch, unreadable ones included.
        workers: decoding processes; 0 decodes in this one.

    Raises:
        RuntimeError: a data worker died, or returned no batch for `WORKER_TIMEOUT` seconds.
    """
    workers = min(workers, -(-len(indices) // batch_size))
    loader = DataLoader(
        _Decoded(source, preprocess, indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        timeout=WORKER_TIMEOUT if workers else 0,
        # forked workers take any transform (no pickling) and start at once; they never touch the accelerator
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_begin_worker,
    )
    with held_signals():
        batches = iter(loader)  # starts the workers
    yield from batches


def _begin_worker(_: int) -> None:
    serve_parent()  # signals that stop a run go to all its processes; its main process handles them
