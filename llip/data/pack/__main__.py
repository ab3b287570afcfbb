"""Pack images with captions into shards, so that training can start.

    llip pack SOURCE --out DIR

SOURCE is a folder of images with NAME.txt or NAME.json beside them, a CSV or TSV with a header, or a JSONL. Bytes of
images are stored as they are. The same source and arguments give the same bytes. Every shard holds `key.jpg` (png,
webp) and `key.txt`; or, where some image has several captions, `key.json` with a list under "captions".
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
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
from llip.system.program import program

START = ("llip_b32", "nodes=1", "ngpus=1", "eval_steps=0", "evals=none")
"""The printed training command: a middling model on one device, with no evaluation sets needed on the way."""

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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip pack", description="Pack images with captions into shards for training."
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a .csv, .tsv or .jsonl file")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the shards go: a folder without any")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples at most [%(default)s]")
    parser.add_argument("--image-root", metavar="DIR", help="what paths start from; left out: the file's folder")
    parser.add_argument("--image-column", metavar="NAME", help=f"left out: one of {', '.join(IMAGE_COLUMNS)}")
    parser.add_argument("--caption-column", metavar="NAME", help=f"left out: one of {', '.join(CAPTION_COLUMNS)}")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one json document instead of text")
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> int:
    """Pack the images and captions that the command line names; return the exit code."""
    arguments = parse_arguments(argv)
    source = Path(arguments.source)
    columns = Columns(arguments.image_column, arguments.caption_column)
    image_root = Path(arguments.image_root) if arguments.image_root else None
    if source.is_dir() and (image_root or columns != Columns()):
        raise UserError("pack: --image-root and the columns are for a file; SOURCE is a folder")
    check_out(Path(arguments.out), arguments.per_shard)
    found = find_pairs(source, image_root, columns)
    seed = None if arguments.no_shuffle else arguments.seed
    packed = pack(found, Path(arguments.out), arguments.per_shard, seed)
    print(json.dumps(dataclasses.asdict(packed)) if arguments.json else as_text(packed))
    return 0


def check_out(out: Path, per_shard: int) -> None:
    """Raise a `UserError` if shards cannot go to `out`, or not so many samples into one."""
    if per_shard < 1:
        raise UserError(f"pack: --per-shard {per_shard}: expected 1 or more")
    if _READ_AS_PATTERN.search(str(out)):
        raise UserError(f"pack: --out {str(out)!r}: in train_data commas, braces, * ? [ ] and :: mean something else")
    if out.exists() and not out.is_dir():
        raise UserError(f"pack: --out {str(out)!r} is a file; expected a folder, which may not exist yet")
    there = sorted(out.glob("*.tar"))
    if there:
        raise UserError(f"pack: --out {str(out)!r} holds {len(there)} shards ({there[0].name}, ...); choose another")


def pack(found: Source, out: Path, per_shard: int, seed: int | None) -> Packed:
    """Write the pairs of `found` to shards in `out`, with an index, and return what was written.

    Samples are spread evenly: no shard is left with a small rest. If anything fails, none of the shards stays.

    Args:
        per_shard: samples of a shard at most.
        seed: of the order of the samples; None: the order of `found`.

    Raises:
        UserError: nothing can be packed, or `out` cannot be written to.
    """
    pairs = list(found.pairs)
    if seed is not None:
        random.Random(seed).shuffle(pairs)
    shards: dict[str, int] = {}
    width = max(5, len(str(-(-len(pairs) // per_shard))))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(pairs), desc="pack", unit="image", mininterval=0.5) as progress:
            for part in _even_parts(pairs, per_shard):
                path = out / f"{len(shards):0{width}d}.tar"
                samples = _write_shard(path, part, sum(shards.values()), found, progress)
                if samples:
                    shards[str(path)] = samples
        if not shards:
            raise UserError(_nothing(found))
        _write_index(shards)
    except BaseException as error:
        for name in shards:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"pack: cannot write to {str(out)!r}: {error}") from error
        raise
    return _summary(found, out, shards)


def _write_index(shards: dict[str, int]) -> None:
    from llip.data.index import describe_shard, write_index  # imports torch: not for --help

    write_index({path: describe_shard(path, samples, 0) for path, samples in shards.items()})


def _even_parts(pairs: list[Pair], per_shard: int) -> Iterator[list[Pair]]:
    count = -(-len(pairs) // per_shard)
    for index in range(count):
        yield pairs[len(pairs) * index // count : len(pairs) * (index + 1) // count]


def _write_shard(path: Path, pairs: list[Pair], first: int, found: Source, progress: tqdm) -> int:
    """Write one shard, whole or not at all, and return its samples; none: no file. `first` numbers its first sample."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    samples = 0
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for pair in pairs:
                progress.update()
                image = _read_image(pair.image, found)
                if image is None:
                    continue
                data, suffix = image
                key = f"{first + samples:08d}-{_slug(pair.image)}"
                _add_member(tar, f"{key}.{suffix}", data)
                if found.several:
                    record = json.dumps({"captions": pair.captions}, ensure_ascii=False)
                    _add_member(tar, f"{key}.json", record.encode())
                else:
                    _add_member(tar, f"{key}.txt", pair.captions[0].encode())
                samples += 1
        if samples:
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return samples


def _read_image(path: Path, found: Source) -> tuple[bytes, str] | None:
    """Return (bytes, suffix by what they are, whatever the file is called), or count why there is no image."""
    try:
        data = path.read_bytes()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        found.drop("image is not there" if missing else "image cannot be read", str(path))
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:  # the header only; the doctor decodes
            kind = image.format or ""
    except Image.DecompressionBombError:
        found.drop("image of too many pixels", str(path))
        return None
    except Exception:  # PIL raises many kinds for damaged bytes
        found.drop("not an image", str(path))
        return None
    if kind not in _SUFFIXES:
        found.drop(f"format {kind.lower()} is not packed", str(path))
        return None
    return data, _SUFFIXES[kind]


def _slug(path: Path) -> str:
    """Return the end of a path's name in characters that are safe in a key."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", path.stem)[-_SLUG:].strip("-")


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and rights are always the same
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _reasons(found: Source) -> str:
    return "; ".join(f"{reason}: {count}, e.g. {found.examples[reason]}" for reason, count in found.dropped.items())


def _nothing(found: Source) -> str:
    wanted = ", ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
    dropped = f"; dropped: {_reasons(found)}" if found.dropped else ""
    return (
        f"pack: nothing to pack; looked for images ({wanted}) with captions (NAME.txt or NAME.json beside NAME.jpg, or "
        f"a column); found {found.seen}{dropped}"
    )


def _summary(found: Source, out: Path, shards: dict[str, int]) -> Packed:
    names = [Path(path).stem for path in shards]
    name = names[0] if len(names) == 1 else f"{{{names[0]}..{names[-1]}}}"
    samples = sum(shards.values())
    train_data, caption_keys = f"{out}/{name}.tar", "json.captions" if found.several else "txt"
    data = (f"train_data={train_data}", f"train_num_samples={samples}", f"caption_keys={caption_keys}")
    batch = min(samples, 256)  # an epoch is at least one batch
    return Packed(
        train_data=train_data,
        train_num_samples=samples,
        caption_keys=caption_keys,
        shards=shards,
        dropped=dict(found.dropped.most_common()),
        examples=found.examples,
        command=shlex.join(["python", "-m", "llip.main", *START, f"batch_size={batch}", *data]),
    )


def as_text(packed: Packed) -> str:
    """Return what was done, as text for people."""
    lines = [f"packed {packed.train_num_samples:,} samples into {len(packed.shards):,} shards: {packed.train_data}"]
    lines += [
        f"dropped {count:,}: {reason} (for instance {packed.examples[reason]})"
        for reason, count in packed.dropped.items()
    ]
    return "\n".join([*lines, "", "to train on it:", f"  {packed.command}"])


if __name__ == "__main__":
    sys.exit(main())
