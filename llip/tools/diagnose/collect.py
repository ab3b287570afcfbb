"""Encode some images of a dataset, with several captions each.

Shapes: B images, T captions of all of them, K mixture tokens, D embedding width.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from llip.data.captions import BadSample, CaptionSource, parse_caption_keys
from llip.data.images import decode_image
from llip.data.prefetch import READ_DEADLINE, ReadWatch, read_ahead
from llip.data.sources import IMAGE_KEYS, check_shards_exist, parse_train_data
from llip.data.tar_reader import Damage, RawSample, read_samples
from llip.errors import UserError
from llip.open_clip.model import Llip

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Collected:
    """Features on the CPU, and counts of what was unusable."""

    h: Tensor  # [B, K, D]
    t: Tensor  # [T, D]
    owners: Tensor  # image of each caption [T], ascending
    damage: dict[str, int]  # reason -> samples or shards


def _captions(sample: RawSample, sources: tuple[CaptionSource, ...], most: int) -> list[str]:
    captions = [caption for source in sources if source.weight > 0 for caption in source.captions(sample)]
    if not captions:
        raise BadSample("no caption")
    return list(dict.fromkeys(captions))[:most]


def _usable(
    data: str, caption_keys: str, most: int, damage: Counter[str], model: Llip
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield preprocessed images [3, S, S] with 1 to `most` captions, shard after shard."""
    shards, sources = parse_train_data(data), parse_caption_keys(caption_keys)
    check_shards_exist(shards)
    for url in shards.urls:
        watch = ReadWatch()
        for sample in read_ahead(read_samples(url, watch=watch), watch, READ_DEADLINE):
            if isinstance(sample, Damage):
                damage[sample.reason] += 1
                continue
            try:
                key = next((key for key in IMAGE_KEYS if key in sample), None)
                if key is None:
                    raise BadSample("no image")
                captions = _captions(sample, sources, most)
                image = to_pil_image(decode_image(sample[key]))
            except BadSample as error:
                damage[error.reason] += 1
                continue
            yield model.preprocess_val(image), captions


@torch.no_grad()
def collect(model: Llip, data: str, caption_keys: str, images: int, captions_per_image: int) -> Collected:
    """Encode the first usable images of a dataset, with their distinct captions.

    Args:
        model: as `llip.open_model` returns it, on any device.
        data, caption_keys: as `train_data` and `caption_keys` in a config.
        images, captions_per_image: maximum of either.

    Raises:
        UserError: a pattern without shards, or fewer than two usable samples.
    """
    device = next(model.parameters()).device
    damage: Counter[str] = Counter()
    hs, ts, owners, count = [], [], [], 0
    samples = itertools.islice(_usable(data, caption_keys, captions_per_image, damage, model), images)
    with tqdm(total=images, unit="img", desc="encode", leave=False) as bar:
        while batch := list(itertools.islice(samples, BATCH)):
            pixels, captions = zip(*batch, strict=True)
            hs.append(model.encode_image(torch.stack(pixels).to(device)).cpu())
            ts.append(model.encode_text(model.tokenizer(list(itertools.chain(*captions))).to(device)).cpu())
            owners += [count + index for index, texts in enumerate(captions) for _ in texts]
            count += len(batch)
            bar.update(len(batch))
    if count < 2:
        reasons = ", ".join(f"{reason} ({number})" for reason, number in damage.most_common(3)) or "nothing else in it"
        raise UserError(f"--data {data!r}: {count} usable samples, expected two or more; found: {reasons}")
    return Collected(torch.cat(hs), torch.cat(ts), torch.tensor(owners), dict(damage))
