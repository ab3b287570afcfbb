"""Images per second of open_clip_train's own loader. `benchmarks.data_loading --compare` starts it in an environment
that has open_clip_train; nothing of this project is imported. Prints one JSON line.
"""

import argparse
import itertools
import json
import time
from importlib.metadata import version

import open_clip
from open_clip_train.data import get_wds_dataset

ENDLESS = 10**9  # samples of an epoch, so that the measurement is inside one; shards are gone through again and again


def loader(train_data: str, workers: int, batch_size: int, image_size: int):
    """Return open_clip_train's loader of training batches, set up as its own program does by default."""
    arguments = argparse.Namespace(
        train_data=train_data,
        train_num_samples=ENDLESS,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch_size,
        workers=workers,
        world_size=1,
    )
    transform = open_clip.image_transform(image_size, is_train=True)
    return get_wds_dataset(
        arguments, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    ).dataloader


def main() -> None:
    """Measure, print `images_per_second` and the versions of the packages that matter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-data", required=True, help="shards, joined by ::")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm-up", type=int, required=True, help="batches before the clock starts")
    given = parser.parse_args()
    batches = iter(loader(given.train_data, given.workers, given.batch_size, given.image_size))
    for images, tokens in itertools.islice(batches, given.warm_up):
        assert images.shape == (given.batch_size, 3, given.image_size, given.image_size), images.shape
        assert len(tokens) == given.batch_size, tokens.shape
    count, start, now = 0, time.perf_counter(), 0.0
    while now < given.seconds or count % max(1, given.workers):  # workers deliver together: whole rounds
        next(batches)
        count, now = count + 1, time.perf_counter() - start
    packages = {name: version(name) for name in ("open_clip_torch", "webdataset", "torch", "pillow")}
    print(json.dumps({"images_per_second": count * given.batch_size / now, "packages": packages}))


if __name__ == "__main__":
    main()
