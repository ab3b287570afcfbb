"""Pack images with captions into shards, so that training can start.

    llip pack SOURCE --out DIR

SOURCE is a folder of images with NAME.txt or NAME.json beside them, a CSV or TSV with a header, or a JSONL. Bytes of
images are stored unchanged. The same source and arguments give the same bytes. Shards hold `key.jpg` (png, webp) and
`key.txt`; or, if some image has several captions, `key.json` with a list under "captions".
"""

import argparse
import dataclasses
import io
import json
import random
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from llip.data.pack.sources import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    Pair,
    Source,
    find_pairs,
)
from llip.errors import UserError
from llip.system.files import atomic_write
from llip.system.program import program

START = ("llip_b32", "nodes=1", "ngpus=1", "eval_steps=0", "evals=none")
"""The printed training command: a small model on one device, without evaluation."""

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a phone's JPEG with a second picture
_SLUG = 60  # characters of a source's name in a key
_READ_AS_PATTERN = re.compile(r"[,{}*?\[\]]|::")


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was written; `dataclasses.asdict` of it is the json document."""

    train_data: str
    train_num_samples: int
    caption_keys: str
    shards: dict[str, int]  # path -> samples
    dropped: dict[str, int]  # reason -> cases
    examples: dict[str, str]  # reason -> the first case
    command: str


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip pack", description="Pack images with captions into shards for training."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder, or a .csv, .tsv or .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder without shards")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples at most [%(default)s]")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder of relative paths [the file's]")
    parser.add_argument("--image-column", metavar="NAME", help=f"[the first of {', '.join(IMAGE_COLUMNS)}]")
    parser.add_argument("--caption-column", metavar="NAME", help=f"[the first of {', '.join(CAPTION_COLUMNS)}]")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one json document instead of text")
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> None:
    """Pack the images and captions that the command line names."""
    arguments = parse_arguments(argv)
    columns = Columns(arguments.image_column, arguments.caption_column)
    if arguments.source.is_dir() and (arguments.image_root or columns != Columns()):
        raise UserError("pack: --image-root and the columns are for a file; SOURCE is a folder")
    check_out(arguments.out, arguments.per_shard)
    source = find_pairs(arguments.source, arguments.image_root, columns)
    seed = None if arguments.no_shuffle else arguments.seed
    packed = pack(source, arguments.out, arguments.per_shard, seed)
    print(json.dumps(dataclasses.asdict(packed)) if arguments.json else as_text(packed))


def check_out(out: Path, per_shard: int) -> None:
    """Raise a `UserError` if shards of that size cannot go to `out`."""
    if per_shard < 1:
        raise UserError(f"pack: --per-shard {per_shard}: expected 1 or more")
    if _READ_AS_PATTERN.search(str(out)):
        raise UserError(f"pack: --out {str(out)!r}: commas, braces, * ? [ ] and :: have a meaning in train_data")
    if out.exists() and not out.is_dir():
        raise UserError(f"pack: --out {str(out)!r} is a file; expected a folder")
    shards = sorted(out.glob("*.tar"))
    if shards:
        raise UserError(f"pack: --out {str(out)!r} holds {len(shards)} shards ({shards[0].name}, ...); choose another")


def pack(source: Source, out: Path, per_shard: int, seed: int | None) -> Packed:
    """Write the pairs of `source` to shards in `out`, with an index, and return what was written.

    Shards are of equal size, up to one sample. After an error no shard remains.

    Args:
        source: pairs of images and captions; counts what is dropped.
        out: folder of the shards.
        per_shard: maximum of samples in a shard.
        seed: of the order of the samples; None: the order of `source`.

    Raises:
        UserError: nothing can be packed, or `out` cannot be written to.
    """
    pairs = list(source.pairs)
    if seed is not None:
        random.Random(seed).shuffle(pairs)
    shards: dict[str, int] = {}
    width = max(5, len(str(-(-len(pairs) // per_shard))))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(pairs), desc="pack", unit="image", mininterval=0.5) as progress:
            for part in _even_parts(pairs, per_shard):
                path = out / f"{len(shards):0{width}d}.tar"
                samples = _write_shard(path, part, sum(shards.values()), source, progress)
                if samples:
                    shards[str(path)] = samples
        if not shards:
            raise UserError(_nothing(source))
        _write_index(shards)
    except BaseException as error:
        for name in shards:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"pack: cannot write to {str(out)!r}: {error}") from error
        raise
    return _summary(source, out, shards)


def _write_index(shards: dict[str, int]) -> None:
    from llip.data.index import describe_shard, write_index  # imports torch: not for --help

    write_index({path: describe_shard(path, samples, 0) for path, samples in shards.items()})


def _even_parts(pairs: list[Pair], per_shard: int) -> Iterator[list[Pair]]:
    count = -(-len(pairs) // per_shard)
    for index in range(count):
        yield pairs[len(pairs) * index // count : len(pairs) * (index + 1) // count]


def _write_shard(path: Path, pairs: list[Pair], first: int, source: Source, progress: tqdm) -> int:
    """Write one shard and return its samples; no file without any. `first` numbers its first sample."""
    samples = 0
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            progress.update()
            image = _read_image(pair.image, source)
            if image is None:
                continue
            data, suffix = image
            key = f"{first + samples:08d}-{_slug(pair.image)}"
            _add_member(tar, f"{key}.{suffix}", data)
            if source.several:
                record = json.dumps({"captions": pair.captions}, ensure_ascii=False)
                _add_member(tar, f"{key}.json", record.encode())
            else:
                _add_member(tar, f"{key}.txt", pair.captions[0].encode())
            samples += 1
    if not samples:
        path.unlink()
    return samples


def _read_image(path: Path, source: Source) -> tuple[bytes, str] | None:
    """Return (bytes, suffix for their format, whatever the file's name), or count the reason against the image."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        source.drop("image is not there" if missing else "image cannot be read", str(path))
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:  # the header only; the doctor decodes
            kind = image.format or ""
    except Image.DecompressionBombError:
        source.drop("image of too many pixels", str(path))
        return None
    except Exception:  # PIL raises many kinds for damaged bytes
        source.drop("not an image", str(path))
        return None
    if kind not in _SUFFIXES:
        source.drop(f"format {kind.lower()} is not packed", str(path))
        return None
    return data, _SUFFIXES[kind]


def _slug(path: Path) -> str:
    """Return the end of a path's name in characters that are safe in a key."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", path.stem)[-_SLUG:].strip("-")


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and rights are always the same
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _nothing(source: Source) -> str:
    wanted = ", ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
    reasons = "; ".join(
        f"{reason}: {count}, e.g. {source.examples[reason]}" for reason, count in source.dropped.items()
    )
    return (
        f"pack: nothing to pack; looked for images ({wanted}) with captions (NAME.txt or NAME.json beside NAME.jpg, or "
        f"a column); found {source.seen}" + (f"; dropped: {reasons}" if reasons else "")
    )


def _summary(source: Source, out: Path, shards: dict[str, int]) -> Packed:
    names = [Path(path).stem for path in shards]
    name = names[0] if len(names) == 1 else f"{{{names[0]}..{names[-1]}}}"
    samples = sum(shards.values())
    train_data, caption_keys = f"{out}/{name}.tar", "json.captions" if source.several else "txt"
    data = (f"train_data={train_data}", f"train_num_samples={samples}", f"caption_keys={caption_keys}")
    batch = min(samples, 256)  # an epoch is at least one batch
    return Packed(
        train_data=train_data,
        train_num_samples=samples,
        caption_keys=caption_keys,
        shards=shards,
        dropped=dict(source.dropped.most_common()),
        examples=source.examples,
        command=shlex.join(["python", "-m", "llip.main", *START, f"batch_size={batch}", *data]),
    )


def as_text(packed: Packed) -> str:
    """Return what was written and dropped, and the command that trains on it."""
    lines = [f"packed {packed.train_num_samples:,} samples into {len(packed.shards):,} shards: {packed.train_data}"]
    lines += [
        f"dropped {count:,}: {reason} (for instance {packed.examples[reason]})"
        for reason, count in packed.dropped.items()
    ]
    return "\n".join([*lines, "", "to train on it:", f"  {packed.command}"])


if __name__ == "__main__":
    sys.exit(main())
