"""Compute the features of a run's frozen towers once, to train on them instead of images and captions.

    llip encode CONFIG [field=value ...] --out DIR
    llip train  CONFIG [field=value ...] feature_cache=DIR

The config must lock what is cached (lock_image, lock_text) and crop alike at each visit (image_crop=center). Started
again, the program continues: finished shards are kept, and those whose source has changed are encoded again.

Exit code: 0 every shard is encoded, 2 a mistake in the request, 3 shards could not be read or no room is left.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llip.config_search import search_config
from llip.errors import RunError
from llip.system.program import program

if TYPE_CHECKING:  # imports torch, which takes seconds: not for --help
    from llip.tools.encode.encode import Encoded


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    about, usage, details = (__doc__ or "").split("\n\n", 2)
    parser = argparse.ArgumentParser(
        prog="llip encode",
        description=f"{about}\n\n{usage}",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="as for llip train, whose --list shows all")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the features")
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "int8"),
        default="fp16",
        help="of the features; int8 has one scale per feature of an image, and half the size [%(default)s]",
    )
    parser.add_argument("--json", action="store_true", help="print one json document instead of text")
    return parser.parse_intermixed_args(argv)


@program
def main(argv: Sequence[str]) -> None:
    """Encode the data of the config that the command line names."""
    given = parse_arguments(argv)
    config = search_config(given.config, given.overrides)
    from llip.tools.encode.encode import encode

    encoded = encode(config, given.out, given.dtype)
    command = shlex.join(["llip", "train", given.config, *given.overrides, f"feature_cache={given.out}"])
    if given.json:
        print(json.dumps(dataclasses.asdict(encoded) | {"command": command}))
    else:
        print(as_text(encoded, command))
    if encoded.unread:
        url, reason = next(iter(encoded.unread.items()))
        raise RunError(
            f"{len(encoded.unread)} shards could not be read, the first is {url!r} ({reason}); run the same command "
            "again, which keeps what is finished"
        )


def as_text(encoded: "Encoded", command: str) -> str:
    """Return what was written and dropped, and the command that trains on it."""
    lines = [
        f"{encoded.usable:,} samples with features in {encoded.shards:,} shards of {encoded.out}: "
        f"{encoded.bytes / 2**20:,.1f} MiB, {encoded.format['dtype']}, {encoded.format['image'][0]} x "
        f"{encoded.format['image'][1]} an image; {encoded.new:,} encoded now in {encoded.seconds:,.0f} s"
    ]
    lines += [f"dropped {count:,}: {reason}" for reason, count in encoded.dropped.items()]
    return "\n".join(lines if encoded.unread else [*lines, "", "to train on it:", f"  {command}"])


if __name__ == "__main__":
    sys.exit(main())
