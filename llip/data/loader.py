"""Batches of images and token ids from webdataset shards: deterministic, resumable, and never silently empty.

Shapes: B images of a batch, N captions per image, S image size, C context length. With a feature cache, L features of
width W stand for an image, and where the text encoder is frozen too, one of width W for a caption.

Each data worker reads its share of the shards. It streams raw samples (`stream`), decodes them and puts
whole batches together. What is drawn for a sample (captions, crop) depends on the seed, the epoch, the shard's name and
the sample's key alone. A batch carries its worker's cursor; a restart resumes there without decoding.
"""

import functools
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llip.configs import Config
from llip.data.captions import BadSample, choose_captions, parse_caption_keys
from llip.data.images import NO_IMAGE, ImageReader
from llip.data.order import WorkerSlot
from llip.data.position import Cursor, DataPosition, Layout, SlotPosition, StreamPosition
from llip.data.prefetch import READ_DEADLINE
from llip.data.sources import IMAGE_KEYS, DataSpec, shard_name
from llip.data.stream import DatasetStream, Mixture
from llip.data.tar_reader import RawSample
from llip.data.transforms import transform_caption, transform_function, transform_image
from llip.data.worker_failure import FailureNote
from llip.data.worker_stats import WorkerReport, WorkerStats
from llip.errors import UserError
from llip.open_clip.transforms import CROP_SCALE, RESIZE_MODES
from llip.system.exit_with_parent import serve_parent

BATCH_DEADLINE = 300.0
"""Seconds without a batch after which a run ends with a message: nothing waits for ever."""
STAGES = ("read", "decode", "tokenize", "idle")
"""Where a worker's time goes: waiting for bytes, decoding and cropping, tokenizing, and having batches in stock."""
_CACHED_WORDS = 200_000  # of the tokenizer, which keeps each word it meets for ever


class MicroBatch(NamedTuple):
    """What a process runs its towers on at once."""

    images: Tensor  # [B, 3, S, S] uint8, or features [B, L, W] float16 or bfloat16
    tokens: Tensor  # [B, N, C] int64, or features [B, N, W]
    mask: Tensor  # [B, N] bool, False where a caption comes again because its image has fewer than N


class Batch(NamedTuple):
    """What a data worker hands over."""

    images: Tensor  # [B, 3, S, S] uint8, channels last; or features, see `MicroBatch`
    tokens: Tensor  # [B, N, C] int64, or features
    mask: Tensor  # [B, N] bool, see `MicroBatch`
    cursor: Cursor  # the worker's position after it
    data_epoch: int  # of the last sample
    report: WorkerReport  # since the worker's last batch
    ids: list[str]  # `shard/key` of each sample
    error: str  # not empty: the worker gives up, with this message

    def to(self, device: torch.device) -> MicroBatch:
        """Return what to compute with on `device`, the images in the layout [B, 3, S, S]."""
        images = self.images.to(device, non_blocking=True).contiguous()  # cheaper there than in a worker
        tokens, mask = (part.to(device, non_blocking=True) for part in (self.tokens, self.mask))
        return MicroBatch(images, tokens, mask)


class Sample(NamedTuple):
    """An image and its captions."""

    image: Any  # Tensor [3, S, S] uint8, or array of features [L, W]
    captions: list[Any]  # N strings, or arrays of features [W]
    mask: list[bool]  # N, False where a caption comes again


class CaptionedImages(IterableDataset):
    """An endless stream of `Batch`es for one training process."""

    def __init__(
        self,
        config: Config,
        data: DataSpec,
        tokenizer: Any,
        image_size: int,
        position: DataPosition,
        rank: int = 0,
        processes: int = 1,
        deadline: float = READ_DEADLINE,
        resize_mode: str = RESIZE_MODES[0],
    ) -> None:
        """Read `data` from `position` on.

        Args:
            config: the run.
            data: its `train_data`, parsed.
            tokenizer: of the model's texts.
            image_size: pixels a side.
            position: where to start; not changed by reading.
            rank: of this process.
            processes: of the run.
            deadline: seconds without a byte after which a shard counts as stalled.
            resize_mode: of the model's evaluation transform, for image_crop=center.

        Raises:
            UserError: `caption_keys` cannot be read, or a transform is not found.
        """
        super().__init__()
        self.config, self.sources, self.features = config, data.sources, data.features
        self.layout = Layout(config.seed, config.shuffle_buffer, data.shard_counts)
        self.caption_sources = parse_caption_keys(config.caption_keys)
        self.image_transform = transform_function("image_transform", config.image_transform)
        self.caption_transform = transform_function("caption_transform", config.caption_transform)
        self.tokenizer, self.image_size, self.deadline = tokenizer, image_size, deadline
        self.rank, self.processes, self.position = rank, processes, position
        self.resize_mode = resize_mode
        self.failure = FailureNote()
        self.on_wait: Callable[[], None] = lambda: None  # called now and then in a wait, where batches are made here

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn, from 0 on: after a restart worker 0 must be the one whose turn it is.
        logical = ((info.id if info else 0) + self.position.batches) % workers
        slot = WorkerSlot(self.rank * workers + logical, self.processes * workers)
        captions = " or ".join(
            source.member if source.field is None else f"json field {source.field!r}" for source in self.caption_sources
        )
        image = "image.npy" if self.features else f"an image ({', '.join(IMAGE_KEYS)})"
        wanted = f"{image} and a caption ({captions})"
        stats = WorkerStats(self.config.max_bad_fraction, len(self.sources), wanted)
        maker = _BatchMaker(self, stats, self._mixture(slot, self._start(logical), stats))
        if info:  # torch has given each worker one thread
            serve_parent([stream.watch.interrupt for stream in maker.mixture.streams])
            self.failure.exit_on_lost_batch()
        else:
            for stream in maker.mixture.streams:
                stream.watch.on_wait = self.on_wait
        try:
            yield from maker.batches()
        except UserError as error:
            # An exception would reach the trainer wrapped in a traceback; a user's mistake is one message.
            nothing = torch.empty(0)
            yield Batch(nothing, nothing, nothing, Cursor(0, []), 0, stats.report(), [], str(error))

    def blank(self) -> Batch:
        """Return a batch of black pictures with empty captions, for a step that is not to be learned from."""
        mask = torch.ones(self.config.batch_size, self.config.captions_per_image, dtype=torch.bool)
        images = self.new_images()
        images[:] = 0
        text: Any = ""
        if self.features is not None and self.features.text is not None:
            text = np.zeros(self.features.text, self.features.array_dtype)
        tokens = self.as_tokens([text] * mask.numel()).unflatten(0, mask.shape)
        return Batch(self.as_images(images), tokens, mask, Cursor(0, []), 0, WorkerReport([], [], {}, 0), [], "")

    def new_images(self) -> Any:
        """Return room for the images of a batch, to be filled with `Sample.image`s."""
        count, size = self.config.batch_size, self.image_size
        if self.features is not None:
            return np.empty((count, *self.features.image), self.features.array_dtype)
        return torch.empty(count, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as crops lie

    def as_images(self, images: Any) -> Tensor:
        """Return filled `new_images` as a tensor."""
        return images if self.features is None else self.features.to_tensor(images)

    def as_tokens(self, captions: list[Any]) -> Tensor:
        """Return the captions of samples as token ids [captions, C], or as features [captions, W]."""
        if self.features is not None and self.features.text is not None:
            return self.features.to_tensor(np.stack(captions))
        return self.tokenizer(captions)

    def _start(self, logical: int) -> SlotPosition:
        if self.position.slots:
            return self.position.slots[logical]
        return SlotPosition(0, [StreamPosition() for _ in self.sources])

    def _mixture(self, slot: WorkerSlot, position: SlotPosition, stats: WorkerStats) -> Mixture:
        check = _Check(self, stats)
        streams = [
            DatasetStream(source, number, slot, self.layout, start, stats, check.usable, self.deadline)
            for number, (source, start) in enumerate(zip(self.sources, position.streams, strict=True))
        ]
        return Mixture(streams, [source.weight for source in self.sources], self.layout.seed, position)

    def image_reader(self) -> ImageReader:
        """Return a reader of images, for one thread."""
        scale = None if self.config.image_crop == "center" else CROP_SCALE
        return ImageReader(self.image_size, scale, resize_mode=self.resize_mode)

    def decode(self, sample: RawSample, data_epoch: int, reader: ImageReader) -> Sample:
        """Return an image, augmented if the config asks for it, and its captions; or the cached features of both.

        Raises:
            BadSample: one of them cannot be used. UserError: a user's transform fails; names the sample.
        """
        name = f"{shard_name(sample['__url__'])}/{sample['__key__']}"
        draw = zlib.crc32(f"{self.layout.seed}/{data_epoch}/{name}".encode(errors="surrogateescape"))
        try:
            return self._draw(sample, draw, reader)
        except UserError as error:
            raise UserError(f"{error} (sample {name})") from error

    def _draw(self, sample: RawSample, draw: int, reader: ImageReader) -> Sample:
        count, sentences = self.config.captions_per_image, self.config.caption_sentences
        captions = choose_captions(sample, self.caption_sources, count, random.Random(draw), sentences)
        mask = [caption not in captions[:place] for place, caption in enumerate(captions)]
        if self.caption_transform is not None:
            seeds = [zlib.crc32(f"{draw}/{place}".encode()) if place else draw for place in range(count)]
            captions = [
                transform_caption(self.caption_transform, caption, seed)
                for caption, seed in zip(captions, seeds, strict=True)
            ]
        if self.features is not None:
            return Sample(*self.features.read(sample, captions), mask)
        key = next((key for key in IMAGE_KEYS if key in sample), None)
        if key is None:
            raise BadSample(NO_IMAGE)
        transform = self.image_transform and functools.partial(transform_image, self.image_transform, seed=draw)
        # separate draws: crops do not depend on what captions take
        return Sample(reader.read(sample[key], random.Random(draw + 2**32), transform), captions, mask)


class _Check:
    """Checks the first samples of a worker as they come, until one is usable."""

    def __init__(self, dataset: CaptionedImages, stats: WorkerStats) -> None:
        self.dataset, self.stats = dataset, stats
        self.bad: Counter[tuple[str, str]] = Counter()
        self.reader = dataset.image_reader()

    def usable(self, sample: RawSample) -> bool:
        try:
            self.dataset.decode(sample, 0, self.reader)
        except BadSample as error:
            self.bad[sample["__url__"], error.reason] += 1
            self.stats.check_start(self.bad, sample)
            return False
        return True


class _BatchMaker:
    """Fills batches from a worker's samples."""

    def __init__(self, dataset: CaptionedImages, stats: WorkerStats, mixture: Mixture) -> None:
        self.dataset, self.stats, self.mixture = dataset, stats, mixture
        self.reader = dataset.image_reader()
        self.known_words = dict(getattr(dataset.tokenizer, "cache", {}))

    def batches(self) -> Iterator[Batch]:
        samples = self.mixture.samples()
        while True:
            images, captions, mask, ids, data_epoch = self._fill(samples)
            start = time.perf_counter()
            tokens = self._tokenize(captions).unflatten(0, mask.shape)
            self.stats.seconds["tokenize"] += time.perf_counter() - start
            cursor, report = self.mixture.cursor(), self.stats.report()
            start = time.perf_counter()
            yield Batch(images, tokens, mask, cursor, data_epoch, report, ids, "")
            self.stats.seconds["idle"] += time.perf_counter() - start

    def _fill(
        self, samples: Iterator[tuple[DatasetStream, RawSample | None]]
    ) -> tuple[Tensor, list[Any], Tensor, list[str], int]:
        """Return images, captions (B N), mask, ids, and the data epoch of the last sample."""
        config, images = self.dataset.config, self.dataset.new_images()
        mask = torch.empty(config.batch_size, config.captions_per_image, dtype=torch.bool)
        captions: list[Any] = []
        ids: list[str] = []
        clock, seconds = time.perf_counter, self.stats.seconds
        self.stats.batch_began = time.monotonic()
        while len(ids) < config.batch_size:
            start = clock()
            stream, sample = next(samples)
            read = clock()
            seconds["read"] += read - start
            if sample is None:  # counted where it was missed
                continue
            try:
                decoded = self.dataset.decode(sample, stream.data_epoch, self.reader)
            except BadSample as error:
                self.stats.drop(error.reason, sample["__url__"], sample)
                continue
            images[len(ids)], mask[len(ids)] = decoded.image, torch.tensor(decoded.mask)
            captions += decoded.captions
            self.stats.use(stream.dataset)
            ids.append(f"{shard_name(sample['__url__'])}/{sample['__key__']}")
            seconds["decode"] += clock() - read
        return self.dataset.as_images(images), captions, mask, ids, stream.data_epoch

    def _tokenize(self, captions: list[Any]) -> Tensor:
        tokenizer, tokens = self.dataset.tokenizer, self.dataset.as_tokens(captions)
        if len(getattr(tokenizer, "cache", ())) > _CACHED_WORDS:
            tokenizer.cache = dict(self.known_words)
        return tokens


def make_loader(dataset: CaptionedImages, pin: bool) -> DataLoader:
    """Return a loader of a process's `Batch`es, with the workers of its config.

    With `workers=0` batches are made in the training process, whose random state is left as it was.

    Args:
        dataset: what to load.
        pin: hand over pinned memory, for CUDA.
    """
    seeds = torch.Generator()  # the loader draws a seed when it starts: not from the run's random state
    if dataset.config.workers == 0:
        return DataLoader(dataset, batch_size=None, pin_memory=pin, generator=seeds)
    return DataLoader(
        dataset,
        batch_size=None,  # workers make whole batches
        num_workers=dataset.config.workers,
        pin_memory=pin,
        generator=seeds,
        prefetch_factor=2,
        timeout=BATCH_DEADLINE,
        multiprocessing_context="fork",  # the parent has imported everything a worker needs
    )
