"""Batches of images and token ids from webdataset shards: deterministic, resumable, and never silently empty.

Shapes: B pairs of a batch, S image size, C context length.

Each data worker is a reader of its own share of the shards (`shards.Reader`): it streams samples, shuffles them in a
buffer of undecoded ones, decodes, and puts whole batches together. What is drawn for a sample (caption, crop) depends
on the seed, the pass and the sample's key alone. A batch carries its reader's cursor, the number of raw samples
consumed so far; a restart skips to it without decoding.
"""

import dataclasses
import io
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import CROP_SCALE
from llip.training.captions import BadSample, choose_caption, parse_caption_keys
from llip.training.shards import Reader, ShardSource, parse_train_data

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
BATCH_DEADLINE = 300.0
"""Seconds without a batch after which a run ends with a message: nothing waits for ever."""
_ENOUGH_TO_JUDGE = 200  # samples seen before the share of bad ones means something


class Batch(NamedTuple):
    """What a data worker hands over."""

    images: Tensor  # [B, 3, S, S] uint8
    tokens: Tensor  # [B, C] int64
    cursor: int  # raw samples that this reader has consumed
    passes: int  # whole passes over its share that this reader has finished
    dropped: dict[str, int]  # reason -> samples dropped by this reader since its last batch
    error: str  # not empty: the reader gives up, with this message

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (images, tokens) on `device`."""
        return self.images.to(device, non_blocking=True), self.tokens.to(device, non_blocking=True)


@dataclasses.dataclass
class DataPosition:
    """Where one process stands in its stream of batches: plain numbers, stored in checkpoints."""

    workers: int
    batches: int = 0
    cursors: list[int] = dataclasses.field(default_factory=list)  # per logical worker

    def advance(self, batch: Batch) -> None:
        """Note that the trainer has used `batch`: batches come from the workers in turn."""
        if not self.cursors:
            self.cursors = [0] * max(1, self.workers)
        self.cursors[self.batches % max(1, self.workers)] = batch.cursor
        self.batches += 1


class _Tally:
    """Counts what a reader saw and dropped, and says so in words."""

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.seen, self.used = 0, 0
        self.dropped: Counter[str] = Counter()  # over the reader's life
        self.unreported: Counter[str] = Counter()
        self.worst_shards: Counter[str] = Counter()
        self.members: Counter[str] = Counter()  # member names of dropped samples

    def drop(self, reason: str, shard: str) -> None:
        self.dropped[reason] += 1
        self.unreported[reason] += 1
        self.worst_shards[shard] += 1

    def report(self) -> dict[str, int]:
        reported, self.unreported = dict(self.unreported), Counter()
        return reported

    def too_many(self) -> bool:
        bad = sum(self.dropped.values())
        return bad >= 1 and self.seen >= _ENOUGH_TO_JUDGE and bad > self.max_bad_fraction * self.seen

    def words(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common(8))
        shards = ", ".join(f"{shard} ({count})" for shard, count in self.worst_shards.most_common(3))
        members = ", ".join(sorted(self.members)[:12]) or "none"
        return f"dropped {reasons or 'none'}; worst shards: {shards or 'none'}; member names seen: {members}"


class CaptionedImages(IterableDataset):
    """An endless stream of `Batch`es for one training process."""

    def __init__(
        self, config: Config, tokenizer: Any, image_size: int, rank: int, processes: int, position: DataPosition
    ) -> None:
        super().__init__()
        self.sources = parse_train_data(config.train_data)
        self.caption_sources = parse_caption_keys(config.caption_keys)
        self.seed, self.batch_size, self.shuffle_buffer = config.seed, config.batch_size, config.shuffle_buffer
        self.max_bad_fraction = config.max_bad_fraction
        self.tokenizer = tokenizer
        self.crop = RandomResizedCrop(image_size, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC)
        self.rank, self.processes, self.position = rank, processes, position

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn, from 0 on: after a restart worker 0 must be the one whose turn it is.
        logical = ((info.id if info else 0) + self.position.batches) % workers
        reader = Reader(self.rank * workers + logical, self.processes * workers)
        cursor = self.position.cursors[logical] if self.position.cursors else 0
        if info:
            torch.set_num_threads(1)
        tally = _Tally(self.max_bad_fraction)
        try:
            yield from self._batches(reader, cursor, tally)
        except UserError as error:
            # An exception would reach the trainer wrapped in a traceback; a user's mistake is one message.
            nothing = torch.empty(0)
            yield Batch(nothing, nothing, 0, 0, {}, str(error))

    def _batches(self, reader: Reader, skip: int, tally: _Tally) -> Iterator[Batch]:
        images: list[Tensor] = []
        captions: list[str] = []
        for cursor, (pass_index, sample) in enumerate(self._raw_samples(reader, tally), start=1):
            if cursor <= skip:
                tally.used += 1  # it was used before the restart: the pass is not empty
                continue
            tally.seen += 1
            try:
                image, caption = self._decode(sample, pass_index)
            except BadSample as error:
                tally.members.update(key for key in sample if not key.startswith("__"))
                tally.drop(error.reason, sample["__url__"])
                if tally.too_many():
                    raise UserError(
                        f"data: more than max_bad_fraction = {self.max_bad_fraction} of the samples cannot be used: "
                        f"{sum(tally.dropped.values())} of {tally.seen}; {tally.words()}"
                    ) from error
                continue
            tally.used += 1
            images.append(image)
            captions.append(caption)
            if len(images) == self.batch_size:
                tokens = self.tokenizer(captions)
                yield Batch(torch.stack(images), tokens, cursor, pass_index, tally.report(), "")
                images, captions = [], []

    def _raw_samples(self, reader: Reader, tally: _Tally) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (pass, undecoded sample) for ever, from the datasets by their weights."""
        streams = [self._source_samples(source, reader, tally) for source in self.sources]
        if len(streams) == 1:
            yield from streams[0]
        weights = [source.weight for source in self.sources]
        rng = random.Random(f"{self.seed}/mixture/{reader.index}")
        while True:
            yield next(rng.choices(streams, weights)[0])

    def _source_samples(
        self, source: ShardSource, reader: Reader, tally: _Tally
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for pass_index in itertools.count():
            used, count = tally.used, 0
            rng = random.Random(f"{self.seed}/shuffle/{pass_index}/{reader.index}/{source.pattern}")
            samples = self._pass_samples(source, reader, pass_index, tally)
            for sample in webdataset.filters._shuffle(samples, bufsize=self.shuffle_buffer, initial=1000, rng=rng):
                count += 1
                yield pass_index, sample
            if tally.used == used and len(self.sources) == 1:
                wanted = f"an image ({', '.join(IMAGE_KEYS)}) and a caption ({self._caption_words()})"
                raise UserError(
                    f"data: a pass over {source.pattern!r} gave reader {reader.index} of {reader.count} no usable "
                    f"sample ({count} read); wanted {wanted}; {tally.words()}"
                )
            if count == 0:
                raise UserError(f"data: {source.pattern!r} holds no sample for reader {reader.index} of {reader.count}")

    def _caption_words(self) -> str:
        return " or ".join(
            source.member if source.field is None else f"json field {source.field!r}" for source in self.caption_sources
        )

    def _pass_samples(
        self, source: ShardSource, reader: Reader, pass_index: int, tally: _Tally
    ) -> Iterator[dict[str, Any]]:
        for url, first, stride in reader.shards(source, self.seed, pass_index):

            def count_error(error: Exception, url: str = url) -> bool:
                tally.seen += 1
                tally.drop(f"unreadable shard ({type(error).__name__})", url)
                return True  # leave this shard, go on with the next

            samples = webdataset.tariterators.tarfile_samples([{"url": url}], handler=count_error)
            yield from itertools.islice(samples, first, None, stride)

    def _decode(self, sample: Mapping[str, Any], pass_index: int) -> tuple[Tensor, str]:
        """Return an augmented image [3, S, S] uint8 and one caption; both depend on seed, pass and key alone."""
        draw = zlib.crc32(f"{self.seed}/{pass_index}/{sample['__key__']}".encode())
        caption = choose_caption(sample, self.caption_sources, random.Random(draw))
        key = next((key for key in IMAGE_KEYS if key in sample), None)
        if key is None:
            raise BadSample("no image")
        try:
            with Image.open(io.BytesIO(sample[key])) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # PIL raises many kinds for damaged bytes; each is one dropped sample
            raise BadSample(f"undecodable image ({type(error).__name__})") from error
        torch.manual_seed(draw)  # the crop draws from torch's generator, which belongs to this worker
        return pil_to_tensor(self.crop(pixels)), caption


def make_loader(
    config: Config, tokenizer: Any, image_size: int, rank: int, processes: int, position: DataPosition, pin: bool
) -> DataLoader:
    """Return a loader of this process's `Batch`es from `position` on.

    With `workers=0` batches are made in the training process, whose random state is then left as it was.
    """
    dataset = CaptionedImages(config, tokenizer, image_size, rank, processes, position)
    own = torch.Generator()  # the loader draws a seed when it starts: not from the run's random state
    if config.workers == 0:
        return DataLoader(_KeepsRandomState(dataset), batch_size=None, pin_memory=pin, generator=own)
    return DataLoader(
        dataset,
        batch_size=None,  # workers make whole batches
        num_workers=config.workers,
        pin_memory=pin,
        generator=own,
        prefetch_factor=2,
        timeout=BATCH_DEADLINE,
        multiprocessing_context="fork",  # the parent has imported everything a worker needs
    )


class _KeepsRandomState(IterableDataset):
    """Draws batches in the training process without touching its random state."""

    def __init__(self, dataset: CaptionedImages) -> None:
        super().__init__()
        self.dataset = dataset

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.dataset)
        while True:
            state = torch.get_rng_state()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                torch.set_rng_state(state)
            yield batch
