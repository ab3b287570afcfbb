"""`llip diagnose CHECKPOINT --data PATTERN`: what the mixture tokens do over a data set.

Exit code: 0, also with alarms (they are in the table, the json and the figure); 2 for a mistake in the request.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llip.errors import UserError
from llip.system.program import program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip diagnose",
        description="Measure how a model uses its mixture tokens; docs/explain.md explains each number.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that this project wrote")
    parser.add_argument("--data", required=True, metavar="PATTERN", help="shards, written as train_data")
    parser.add_argument("--caption-keys", default="txt", metavar="KEYS", help="as caption_keys [%(default)s]")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="at most [%(default)s]")
    parser.add_argument("--captions-per-image", type=int, default=4, metavar="N", help="at most [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write diagnosis.json and diagnosis.png there")
    parser.add_argument("--json", action="store_true", help="print one json document instead of a table")
    return parser.parse_args(argv)


def _run(given: argparse.Namespace) -> None:
    for option, value, least in (("--images", given.images, 2), ("--captions-per-image", given.captions_per_image, 1)):
        if value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    from llip.open_clip.factory import load_pretrained
    from llip.tools.diagnose.collect import collect
    from llip.tools.diagnose.figure import draw
    from llip.tools.diagnose.report import as_table, diagnose

    model = load_pretrained(given.checkpoint)
    try:
        model = model.to(given.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {given.device}: {error}") from error
    found = collect(model, given.data, given.caption_keys, given.images, given.captions_per_image)
    report = {"checkpoint": str(given.checkpoint), "data": given.data, **diagnose(model, found)}
    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "diagnosis.json").write_text(json.dumps(report, indent=1) + "\n")
            draw(report, str(given.checkpoint), given.out / "diagnosis.png")
        except OSError as error:
            raise UserError(f"--out {str(given.out)!r} cannot be written: {error}") from error
    print(json.dumps(report) if given.json else as_table(report))


@program
def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    given = parse_arguments(argv)
    _run(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
