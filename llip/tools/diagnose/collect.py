"""From shards to features: some images of a data set with several captions each.

Shapes: B images, T captions of all of them, K mixture tokens, D embedding width.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from llip.data.captions import BadSample, CaptionSource, parse_caption_keys
from llip.data.images import decode_image
from llip.data.sources import IMAGE_KEYS, check_shards_exist, parse_train_data
from llip.data.tar_reader import Damage, RawSample, read_samples
from llip.errors import UserError
from llip.open_clip.model import Llip

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Collected:
    """Features on the CPU, and what could not be used."""

    h: Tensor  # [B, K, D]
    t: Tensor  # [T, D]
    owners: Tensor  # image of each caption [T], ascending
    damage: dict[str, int]  # reason -> samples or shards


def _captions(sample: RawSample, sources: tuple[CaptionSource, ...], most: int) -> list[str]:
    found = [caption for source in sources if source.weight > 0 for caption in source.captions(sample)]
    return list(dict.fromkeys(found))[:most]


def _usable(
    data: str, caption_keys: str, most: int, damage: Counter[str], model: Llip
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield preprocessed images [3, S, S] with 1 to `most` captions, shard after shard."""
    shards, sources = parse_train_data(data), parse_caption_keys(caption_keys)
    check_shards_exist(shards)
    for url in shards.urls:
        for sample in read_samples(url):
            if isinstance(sample, Damage):
                damage[sample.reason] += 1
                continue
            try:
                key = next((key for key in IMAGE_KEYS if key in sample), None)
                if key is None:
                    raise BadSample("no image")
                captions = _captions(sample, sources, most)
                if not captions:
                    raise BadSample("no caption")
                image = to_pil_image(decode_image(sample[key]))
            except BadSample as error:
                damage[error.reason] += 1
                continue
            yield model.preprocess_val(image), captions


@torch.no_grad()
def collect(model: Llip, data: str, caption_keys: str, images: int, captions_per_image: int) -> Collected:
    """Encode the first usable images of a data set, with up to so many different captions each.

    Args:
        model: as `llip.load_pretrained` returns it, on any device.
        data, caption_keys: as `train_data` and `caption_keys` in a config.

    Raises:
        UserError: a pattern that names nothing, or fewer than two usable samples.
    """
    device = next(model.parameters()).device
    damage: Counter[str] = Counter()
    hs, ts, owners = [], [], []
    pixels: list[Tensor] = []
    captions: list[str] = []

    def encode() -> None:
        if pixels:
            hs.append(model.encode_image(torch.stack(pixels).to(device)).cpu())
            ts.append(model.encode_text(model.tokenizer(captions).to(device)).cpu())
            pixels.clear(), captions.clear()

    with tqdm(total=images, unit="img", desc="encode", leave=False) as bar:
        for image, own in _usable(data, caption_keys, captions_per_image, damage, model):
            owners += [bar.n] * len(own)
            pixels.append(image)
            captions += own
            bar.update()
            if len(pixels) == BATCH or bar.n == images:
                encode()
            if bar.n == images:
                break
        encode()
        found = bar.n
    if found < 2:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in damage.most_common(3)) or "nothing else in it"
        raise UserError(f"--data {data!r}: {found} usable samples, expected two or more; found: {reasons}")
    return Collected(torch.cat(hs), torch.cat(ts), torch.tensor(owners), dict(damage))
