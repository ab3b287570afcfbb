"""Loaders over shards made on the spot, and what their batches hold."""

import itertools
from collections import Counter

from llip.configs import Config
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data, shard_name
from llip.open_clip.factory import get_tokenizer
from tests.helpers import image_bytes

TOKENIZER = get_tokenizer(context_length=12)


def loader(config, rank=0, processes=1, position=None):
    data, position = parse_train_data(config.train_data), position or DataPosition(config.workers)
    return make_loader(CaptionedImages(config, data, TOKENIZER, 32, position, rank, processes), pin=False)


def config(pattern, **changes):
    return Config(train_data=pattern, **{"batch_size": 4, "workers": 0, **changes})


def take(count, *arguments, **keywords):
    return list(itertools.islice(iter(loader(*arguments, **keywords)), count))


def captions(batches):
    """The numbers in the captions `picture number <i> of all`, which name the samples."""
    text = (TOKENIZER.decode([t for t in row.tolist() if t]) for batch in batches for row in batch.tokens.flatten(0, 1))
    return [int(line.split("number")[1].split("of")[0].replace(" ", "")) for line in text]


def ids(batches):
    return [name for batch in batches for name in batch.ids]


def dropped(batches):
    """(shard's name, reason) -> samples, over the batches."""
    found = Counter()
    for batch in batches:
        for shard, reason, count in batch.report.dropped:
            found[shard_name(shard), reason] += count
    return found


def good(first, count):
    return [{"png": image_bytes(i), "txt": b"picture number %d of all" % i} for i in range(first, first + count)]
