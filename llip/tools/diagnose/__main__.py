"""`llip diagnose MODEL --data PATTERN`: measure how a model uses its mixture tokens on a dataset.

Exit code: 0, also with alarms (they are in the table, the json and the figure); 2 for a mistake in the request.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llip.errors import UserError
from llip.system.files import write_json
from llip.system.program import program
from llip.tools.models import MODEL_HELP, add_model_options, open_on_device


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip diagnose",
        description="Measure how a model uses its mixture tokens; docs/explain.md explains each number.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="PATTERN", help="shards, as train_data")
    parser.add_argument("--caption-keys", default="txt", metavar="KEYS", help="as caption_keys [%(default)s]")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="at most [%(default)s]")
    parser.add_argument("--captions-per-image", type=int, default=4, metavar="N", help="at most [%(default)s]")
    add_model_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write diagnosis.json and diagnosis.png there")
    parser.add_argument("--json", action="store_true", help="print one json document instead of a table")
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> None:
    """Measure a model and print the report."""
    given = parse_arguments(argv)
    for option, value, least in (("--images", given.images, 2), ("--captions-per-image", given.captions_per_image, 1)):
        if value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    from llip.tools.diagnose.collect import collect
    from llip.tools.diagnose.figure import draw
    from llip.tools.diagnose.report import as_table, diagnose

    model = open_on_device(given.model, given.pretrained, given.tokenizer, given.device)
    features = collect(model, given.data, given.caption_keys, given.images, given.captions_per_image)
    report = {"checkpoint": given.model, "data": given.data, **diagnose(model, features)}
    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
            write_json(given.out / "diagnosis.json", report)
            draw(report, given.model, given.out / "diagnosis.png")
        except OSError as error:
            raise UserError(f"--out {str(given.out)!r} cannot be written: {error}") from error
    print(json.dumps(report) if given.json else as_table(report))


if __name__ == "__main__":
    sys.exit(main())
