"""Images per second of the training loader: `python -m benchmarks.data_loading --train-data PATTERN --workers 2`.

The rate is that of a steady state, without the start of the workers, and is set against the decode limit: what decoding
alone, of the same images, would allow on the cores that the workers have. Without data, `--make DIR` writes some.

`--compare PYTHON` measures open_clip_train beside it: the same shards, workers and batches, in turn, in an environment
of its own, because it needs an older webdataset. To make one:

    uv venv --python 3.11 open_clip_env
    uv pip install --python open_clip_env/bin/python "open_clip_torch[training]==3.3.0" webdataset==0.2.86

and then pass `--compare open_clip_env/bin/python`.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from tqdm import tqdm

from llip.configs import Config
from llip.data.captions import choose_captions, parse_caption_keys
from llip.data.images import ImageReader, decode_image
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import IMAGE_KEYS, check_shards_exist, is_local, parse_train_data
from llip.data.tar_reader import read_samples
from llip.errors import UserError
from llip.open_clip.factory import get_tokenizer
from llip.open_clip.transforms import CROP_SCALE
from llip.system.cores import usable_cores
from llip.system.files import atomic_write
from llip.system.program import program

CONTEXT_LENGTH = 77
MADE_SHARDS, MADE_PER_SHARD = 8, 250
MADE_WIDTH, MADE_HEIGHT = 512, 384
OTHER = Path(__file__).with_name("open_clip_loading.py")
STAGE_SAMPLES = 400
START_DEADLINE = 180.0
"""Seconds that the other interpreter may take beyond the time it measures."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured."""

    train_data: str
    workers: int
    batch_size: int
    image_size: int
    seconds: float

    @property
    def warm_up(self) -> int:
        """Batches before the clock starts: more than the workers have ready when the first one comes."""
        return 4 * max(1, self.workers)

    @property
    def busy_cores(self) -> int:
        """Cores that load data: one per worker, as far as there are cores for this process."""
        cores = usable_cores()
        return min(max(1, self.workers), cores)


def llip_batches(setup: Setup) -> Iterator[int]:
    """Yield the number of images of each batch of this project's loader, for ever."""
    config = Config(train_data=setup.train_data, workers=setup.workers, batch_size=setup.batch_size)
    tokenizer = get_tokenizer(context_length=CONTEXT_LENGTH)
    position = DataPosition(setup.workers)
    data = parse_train_data(setup.train_data)
    dataset = CaptionedImages(config, data, tokenizer, setup.image_size, position)
    for batch in make_loader(dataset, torch.cuda.is_available()):
        if batch.error:
            raise UserError(batch.error)
        yield len(batch.images)


def steady_rate(setup: Setup) -> float:
    """Return images per second of this project's loader, once it runs."""
    with contextlib.closing(llip_batches(setup)) as batches:
        for _ in itertools.islice(batches, setup.warm_up):
            pass
        images, count, start, now = 0, 0, time.perf_counter(), 0.0
        while now < setup.seconds or count % max(1, setup.workers):  # workers deliver together: whole rounds
            images += next(batches)
            count, now = count + 1, time.perf_counter() - start
    return images / now


def other_rate(setup: Setup, python: str) -> dict[str, Any]:
    """Return what `open_clip_loading.py` prints when `python` runs it on the same shards.

    Raises:
        UserError: it cannot be started, fails, or does not end in time.
    """
    urls = parse_train_data(setup.train_data).urls
    values = {
        "--train-data": "::".join(str(Path(url).absolute()) if is_local(url) else url for url in urls),
        "--workers": setup.workers,
        "--batch-size": setup.batch_size,
        "--image-size": setup.image_size,
        "--seconds": setup.seconds,
        "--warm-up": setup.warm_up,
    }
    command = [python, "-I", str(OTHER), *(str(part) for pair in values.items() for part in pair)]
    deadline = START_DEADLINE + 3 * setup.seconds
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, check=True)
    except OSError as error:
        raise UserError(f"--compare {python!r} cannot be started ({error}); expected a Python interpreter") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"--compare {python!r} gave no result in {deadline:.0f} s; try fewer workers") from error
    except subprocess.CalledProcessError as error:
        last = "\n".join(error.stderr.splitlines()[-6:])
        raise UserError(f"--compare {python!r} failed; --help says what it needs. Its last lines:\n{last}") from error
    return json.loads(done.stdout.splitlines()[-1])


def first_samples(train_data: str, count: int) -> list[dict[str, bytes]]:
    """Read the first `count` samples that have an image and a caption."""
    items = itertools.chain.from_iterable(map(read_samples, parse_train_data(train_data).urls))
    usable = (item for item in items if isinstance(item, dict) and image_bytes(item) and caption(item))
    samples = list(itertools.islice(usable, count))
    if not samples:
        raise UserError(f"train_data {train_data!r}: no sample has an image ({', '.join(IMAGE_KEYS)}) and a txt")
    return samples


def image_bytes(sample: dict[str, bytes]) -> bytes:
    """Return the encoded image of a sample, nothing where it has none."""
    return next((sample[key] for key in IMAGE_KEYS if key in sample), b"")


def caption(sample: dict[str, bytes]) -> str:
    """Return the caption that the loader would take, '' where there is none."""
    if not sample.get("txt", b"").strip():
        return ""
    return choose_captions(sample, parse_caption_keys("txt"), 1, random.Random(0))[0]


def seconds_each(work: Callable[[], Any], count: int, least: float) -> float:
    """Return the seconds that `work`, which handles `count` things, takes for one: the fastest of several runs."""
    work()
    fastest, end = float("inf"), time.perf_counter() + least
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / count


def for_each(work: Callable[[bytes], Any], files: list[bytes]) -> None:
    """Do `work` on each file and drop what it returns: kept pictures would cost fresh memory, which no loader pays."""
    for data in files:
        work(data)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as in a data worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decode_rate(setup: Setup) -> float:
    """Return images per second that one thread decodes, and does nothing else."""
    files = [image_bytes(sample) for sample in first_samples(setup.train_data, 128)]
    with one_thread():
        return 1 / seconds_each(lambda: for_each(decode_image, files), len(files), setup.seconds / 4)


def stages(setup: Setup) -> dict[str, float]:
    """Return the microseconds per image of each stage on one core, each measured by itself."""
    samples = first_samples(setup.train_data, STAGE_SAMPLES)
    count, size = len(samples), setup.image_size
    files, captions = [image_bytes(sample) for sample in samples], [caption(sample) for sample in samples]
    tokenizer = get_tokenizer(context_length=CONTEXT_LENGTH)
    reader, rng = ImageReader(size, CROP_SCALE), random.Random(0)
    with one_thread():
        crops = [reader.read(data, rng) for data in files[: setup.batch_size]]
        batch = torch.empty(len(crops), 3, size, size, dtype=torch.uint8)
        work = {
            "read": (lambda: first_samples(setup.train_data, count), count),
            "decode": (lambda: for_each(decode_image, files), count),
            "crop": (lambda: for_each(lambda data: reader.read(data, rng), files), count),
            "tokenize": (lambda: tokenizer(captions), count),
            "collate": (lambda: torch.stack(crops, out=batch), len(crops)),
        }
        microseconds = {
            name: 1e6 * seconds_each(*work[name], setup.seconds / 4)
            for name in tqdm(work, desc="stages", file=sys.stderr, disable=None)
        }
    microseconds["crop"] -= microseconds["decode"]  # cropped where it was decoded, while the pixels are in the cache
    return microseconds


def photo(rng: np.random.Generator) -> Image.Image:
    """Return a picture with detail at every scale, in some places more than in others, mostly grey, and some grain."""

    def noise(cell: int, channels: int) -> np.ndarray:
        grid = rng.normal(size=(MADE_HEIGHT // cell + 2, MADE_WIDTH // cell + 2, channels)).astype(np.float32)
        layers = [Image.fromarray(grid[..., channel]) for channel in range(channels)]
        return np.stack([layer.resize((MADE_WIDTH, MADE_HEIGHT), Image.BICUBIC) for layer in layers], axis=-1)

    detail = np.exp(noise(96, 1))
    pixels = noise(128, 3) * 6
    for cell in (2, 4, 8, 16, 32, 64):
        pixels = pixels + cell**0.5 * (detail * noise(cell, 1) if cell < 32 else noise(cell, 1))
    pixels = pixels / pixels.std() * rng.uniform(40, 60) + rng.uniform(90, 150)
    pixels = pixels + rng.normal(size=pixels.shape) * rng.uniform(2, 8)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_shards(folder: Path, seed: int = 0) -> str:
    """Write shards of made-up photographs with captions, those that are not there yet, and return their pattern."""
    nouns = ["photo", "city", "river", "people", "dog", "window"]
    words = ["a", "the", "of", "in", "on", "with", "red", "old", "two", *nouns]
    folder.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(range(MADE_SHARDS), desc=f"shards in {folder}", file=sys.stderr, disable=None):
        path = folder / f"{shard:05d}.tar"
        if path.exists():
            continue
        with atomic_write(path) as temporary, webdataset.TarWriter(str(temporary)) as tar:
            for index in range(MADE_PER_SHARD):
                rng = np.random.default_rng([seed, shard, index])
                buffer = io.BytesIO()
                photo(rng).save(buffer, "JPEG", quality=int(rng.integers(85, 91)))
                text = " ".join(rng.choice(words, rng.integers(6, 18))).encode()
                tar.write({"__key__": f"{shard:05d}{index:04d}", "jpg": buffer.getvalue(), "txt": text})
    return str(folder / f"{{00000..{MADE_SHARDS - 1:05d}}}.tar")


def measure(setup: Setup, rounds: int, compare: str | None, with_stages: bool) -> dict[str, Any]:
    """Return every number that was asked for. Ours and theirs take turns, so that a slow minute hits both."""
    check_shards_exist(parse_train_data(setup.train_data))
    sizes = [len(image_bytes(sample)) for sample in first_samples(setup.train_data, 128)]
    rates, other, limits = [], [], []
    for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr, disable=None):
        rates.append(steady_rate(setup))
        if compare:
            other.append(other_rate(setup, compare))
        limits.append(decode_rate(setup))
    rate, limit = sum(rates) / rounds, max(limits) * setup.busy_cores
    result = {
        "images_per_second": rate,
        "decode_limit_images_per_second": limit,
        "share_of_decode_limit": rate / limit,
        "workers": setup.workers,
        "cores": setup.busy_cores,
        "batch_size": setup.batch_size,
        "image_size": setup.image_size,
        "bytes_per_image": sum(sizes) / len(sizes),
        "rounds": rates,
    }
    if other:
        other_rates = [row["images_per_second"] for row in other]
        theirs = sum(other_rates) / rounds
        result["open_clip_train"] = {
            "images_per_second": theirs,
            "rounds": other_rates,
            "packages": other[0]["packages"],
        }
        result["ratio_to_open_clip_train"] = rate / theirs
    if with_stages:
        result["stage_microseconds"] = stages(setup)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the numbers of `measure` for people."""
    lines = [
        f"{result['workers']} workers on {result['cores']} cores, batches of {result['batch_size']}, "
        f"{result['bytes_per_image'] / 1e3:.0f} kB per image, to {result['image_size']} px",
        f"{'llip':34} {result['images_per_second']:8,.0f} images/s",
    ]
    if other := result.get("open_clip_train"):
        name = f"open_clip_train {other['packages']['open_clip_torch']}"
        lines.append(f"{name:34} {other['images_per_second']:8,.0f} images/s")
        lines.append(f"{'ratio':34} {result['ratio_to_open_clip_train']:8.2f}")
    lines.append(f"{'decode limit':34} {result['decode_limit_images_per_second']:8,.0f} images/s")
    lines.append(f"{'share of the decode limit':34} {result['share_of_decode_limit']:8.0%}")
    if by_stage := result.get("stage_microseconds"):
        lines.append("one core, microseconds per image:")
        lines += [f"  {name:32} {value:8,.0f}" for name, value in by_stage.items()]
        lines.append(f"  {'sum':32} {sum(by_stage.values()):8,.0f}")
        whole = 1e6 * result["cores"] / result["images_per_second"]
        lines.append(f"  {'the loader, as measured above':32} {whole:8,.0f}")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--train-data", metavar="PATTERN", help="shards, as in a config's train_data")
    data.add_argument("--make", type=Path, metavar="DIR", help="write shards of made-up photographs there and use them")
    parser.add_argument("--workers", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=100, help="[%(default)s]")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side [%(default)s]")
    parser.add_argument("--seconds", type=float, default=10, help="length of one measurement [%(default)s]")
    parser.add_argument("--rounds", type=int, default=1, help="measurements; their mean counts [%(default)s]")
    parser.add_argument("--compare", metavar="PYTHON", help="interpreter that has open_clip_train: measure it too")
    parser.add_argument("--stages", action="store_true", help="also time the stages one by one, on one core")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the table")
    given = parser.parse_args(arguments)
    for name, least in {"workers": 0, "batch_size": 1, "image_size": 1, "seconds": 0.1, "rounds": 1}.items():
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: expected at least {least}")
    return given


@program
def main(arguments: Sequence[str]) -> int:
    """Measure and print. Returns the exit code."""
    given = parse_arguments(arguments)
    train_data = make_shards(given.make) if given.make else given.train_data
    setup = Setup(train_data, given.workers, given.batch_size, given.image_size, given.seconds)
    result = measure(setup, given.rounds, given.compare, given.stages)
    print(json.dumps(result) if given.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
