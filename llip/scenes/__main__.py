"""`llip scenes --out DIR`: write the embedded dataset, unless it is there already."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llip.scenes import contact_sheet, ensure_scenes
from llip.scenes.shards import MANIFEST, ScenesArgs
from llip.system.program import program


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = ScenesArgs()
    parser = argparse.ArgumentParser(prog="llip scenes", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--train", type=int, default=default.train, help="training scenes (default %(default)s)")
    parser.add_argument(
        "--test", type=int, default=default.test, help="scenes of each evaluation set (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="(default %(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=default.image_size, help="pixels a side (default %(default)s)"
    )
    parser.add_argument(
        "--captions", type=int, default=default.captions, help="of each training scene (default %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="also write a picture of example scenes")
    parser.add_argument("--rows", type=int, default=2, help="rows of the sheet (default %(default)s)")
    parser.add_argument("--cols", type=int, default=5, help="columns of the sheet (default %(default)s)")
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    args = _parse(argv)
    out = ensure_scenes(args.out, args.train, args.test, args.seed, args.image_size, args.captions)
    if args.sheet is not None:
        contact_sheet(out, args.sheet, args.rows, args.cols)
    manifest = json.loads((out / MANIFEST).read_text())
    print(f"{out}: {manifest['train']['samples']} training scenes in {manifest['train']['pattern']}")
    for name, task in manifest["tasks"].items():
        classes = f", {task['classes']} classes" if "classes" in task else ""
        print(f"{out / name}: {task['samples']} test scenes{classes}")
    if args.sheet is not None:
        print(f"{args.sheet}: example scenes")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated run also clears its draft
    sys.exit(main())
