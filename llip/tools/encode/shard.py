"""One source shard -> one shard of features: decoded in threads, encoded in batches, written under its name at the end.

Shapes: B images of a batch, S image size, L features of an image, W their width, T captions of a batch.
"""

import dataclasses
import io
import itertools
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from llip.configs import Config
from llip.data.captions import BadSample, distinct_captions, parse_caption_keys
from llip.data.features.cache import CachedShard, describe_source, source_change
from llip.data.features.format import ERROR, IMAGE, TEXT, FeatureFormat, fits, write_features
from llip.data.images import NO_IMAGE, center_crop, decode_image
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.shard_file import COMMAND_FAILED, DOWNLOAD_FAILED, MISSING, STALLED, UNREADABLE
from llip.data.sources import IMAGE_KEYS
from llip.data.tar_reader import Damage, RawSample, read_samples
from llip.data.worker_stats import WorkerStats
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.tokenizer import Tokenizer
from llip.open_clip.towers.text import frozen_text_features
from llip.system.cores import usable_cores
from llip.system.files import atomic_write

_PASSING = (COMMAND_FAILED, DOWNLOAD_FAILED, MISSING, STALLED, UNREADABLE)  # a later attempt may read more
_LARGEST_BATCH = {
    "cpu": 64,
    "cuda": 256,
}  # images, or captions; a frozen tower keeps no activations, and gains nothing from more


class UnreadableShard(Exception):
    """A shard that cannot be read this time; nothing is written of it."""


@dataclasses.dataclass
class _Sample:
    """A sample on its way: `reason` why it cannot be used, or the image and the captions."""

    key: str
    members: dict[str, bytes]  # that captions come from
    reason: str = ""
    image: Tensor | None = None  # [3, S, S] uint8
    captions: list[str] = dataclasses.field(default_factory=list)


class Encoder:
    """Encodes shards with the frozen parts of a model."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        model: Llip,
        tokenizer: Tokenizer,
        form: FeatureFormat,
        stats: WorkerStats,
    ) -> None:
        """Prepare to encode.

        Args:
            config: the run.
            spec: its model.
            model: with the locks of the config, on its device.
            tokenizer: of the model.
            form: of the features.
            stats: counts what is used and dropped.
        """
        self.spec, self.model, self.tokenizer, self.form, self.stats = spec, model.eval(), tokenizer, form, stats
        self.sources = parse_caption_keys(config.caption_keys)
        self.caption_members = list(dict.fromkeys(source.member for source in self.sources))
        self.device = next(model.parameters()).device
        self.batch_size = min(config.batch_size, _LARGEST_BATCH[self.device.type])
        dtype = None if self.device.type == "cpu" else autocast_dtype(config.precision)
        self.autocast = nullcontext if dtype is None else lambda: torch.autocast(self.device.type, dtype=dtype)
        self.pool = ThreadPoolExecutor(usable_cores(), "decode")

    def encode_shard(self, url: str, path: Path, progress: Callable[[int], None]) -> CachedShard:
        """Write the features of the samples of `url` to `path`, and return what was written, without its name.

        Args:
            url: of the source shard.
            path: of the cache's shard, which appears whole or not at all.
            progress: called with the number of samples after each batch.

        Raises:
            UnreadableShard: a command, a download or a disk failed.
            UserError: too many samples cannot be used, features are not finite or too large for their type, the shard
                changed while it was read, or it stalls.
            OSError: the disk cannot take the file.
        """
        try:
            source = describe_source(url)
        except OSError as error:
            raise UnreadableShard(error.strerror) from error
        unusable: dict[str, int] = {}
        samples = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, flush=True) as temporary:
            with tarfile.open(temporary, "w") as tar:
                for batch in self._batches(url):
                    for sample, members in zip(batch, self._members(batch), strict=True):
                        for suffix, data in members.items():
                            member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
                        if sample.reason:
                            unusable[sample.reason] = unusable.get(sample.reason, 0) + 1
                    samples += len(batch)
                    progress(len(batch))
            shard = CachedShard("", samples, unusable, temporary.stat().st_size, **source)
            if change := source_change(url, shard):
                raise UserError(
                    f"source shard {url!r} changed while it was read: {change}; run again when it is complete"
                )
        return shard

    def _batches(self, url: str) -> Iterator[list[_Sample]]:
        """Yield the samples of a shard in batches, while the next ones are decoded."""
        samples = self._samples(url)
        while batch := list(itertools.islice(samples, self.batch_size)):
            yield batch

    def _samples(self, url: str) -> Iterator[_Sample]:
        decoding: deque[Future[_Sample]] = deque()
        watch = ReadWatch()
        for item in read_ahead(read_samples(url, watch=watch), watch):
            if not isinstance(item, Damage):
                decoding.append(self.pool.submit(self._decode, item))
            elif item.reason in _PASSING:
                raise UnreadableShard(f"{item.reason}{f': {item.detail}' if item.detail else ''}")
            else:
                self.stats.drop(item.reason, url)
            if len(decoding) > 2 * self.batch_size:
                yield self._counted(decoding.popleft().result(), url)
        while decoding:
            yield self._counted(decoding.popleft().result(), url)

    def _counted(self, sample: _Sample, url: str) -> _Sample:
        if sample.reason:
            self.stats.drop(sample.reason, url, sample.members)
        else:
            self.stats.use(0)
        return sample

    def _decode(self, raw: RawSample) -> _Sample:
        """Return a sample with its image, cropped as for `image_crop=center`; the reasons are those of training."""
        sample = _Sample(raw["__key__"], {name: raw[name] for name in self.caption_members if name in raw})
        try:
            sample.captions = distinct_captions(raw, self.sources)
            key = next((key for key in IMAGE_KEYS if key in raw), None)
            if key is None:
                raise BadSample(NO_IMAGE)
            sample.image = center_crop(decode_image(raw[key]), self.spec.image_size, self.spec.resize_mode)
        except BadSample as error:
            sample.reason = error.reason
        return sample

    def _members(self, batch: list[_Sample]) -> list[dict[str, bytes]]:
        """Return the members of each sample, features or the reason why there are none first."""
        good = [sample for sample in batch if sample.image is not None and not sample.reason]
        images = iter(self._image_features([sample.image for sample in good if sample.image is not None]))
        captions = [caption for sample in good for caption in sample.captions]
        texts = iter(self._text_features(captions) if self.form.text is not None else ())
        members = []
        for sample in batch:
            if sample.reason:
                members.append({ERROR: sample.reason.encode(), **sample.members})
                continue
            features = write_features(IMAGE, next(images), self.form.dtype)
            if self.form.text is not None:
                rows = torch.stack(list(itertools.islice(texts, len(sample.captions))))
                features |= write_features(TEXT, rows, self.form.dtype)
                features[f"{TEXT}.json"] = json.dumps(sample.captions, ensure_ascii=False).encode()
            members.append({**features, **sample.members})
        return members

    @torch.no_grad()
    def _image_features(self, images: list[Tensor]) -> Tensor:
        """Return the frozen features [B, L, W] of images [3, S, S] uint8, on the CPU."""
        if not images:
            return torch.empty(0)
        pixels = torch.stack(images).contiguous().to(self.device)
        with self.autocast():
            return self._checked(self.model.visual.frozen_features(self.model.normalise(pixels)), "images")

    @torch.no_grad()
    def _text_features(self, captions: list[str]) -> Tensor:
        """Return the frozen features [T, W] of captions, on the CPU."""
        order = sorted(range(len(captions)), key=lambda row: len(captions[row]))  # alike in length: little padding
        features = torch.empty(len(captions), self.form.text or 0)
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            tokens = self.tokenizer([captions[row] for row in rows]).to(self.device)
            with self.autocast():
                features[rows] = self._checked(frozen_text_features(self.model.text, tokens), "captions")
        return features

    def _checked(self, features: Tensor, what: str) -> Tensor:
        features = features.float().cpu()
        if not fits(features, self.form.dtype):
            largest = features.abs().max().item()
            raise UserError(
                f"features of {what} reach {largest:g}, which {self.form.dtype} does not hold; "
                + ("encode with --dtype bf16" if features.isfinite().all() else "check the weights of the frozen tower")
            )
        return features
