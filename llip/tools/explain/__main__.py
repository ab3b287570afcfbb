"""Draw what a model attends to: `llip explain MODEL --images ... --captions ... --out FILE.png`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llip.errors import UserError
from llip.system.program import program
from llip.tools.models import MODEL_HELP, add_model_options, open_on_device

if TYPE_CHECKING:  # imports torch, which takes seconds: not for --help
    from llip.tools.explain.explanation import Explanation

MOST_IMAGES, MOST_CAPTIONS, MOST_TOKENS = 8, 8, 8
"""Limits of a legible figure."""
_CAPTION = 60  # characters of a caption in the table


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip explain",
        description="Draw the scores of images and captions, the weights over mixture tokens, and where tokens look.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help=f"at most {MOST_IMAGES}")
    parser.add_argument("--captions", nargs="+", metavar="TEXT", help=f"at most {MOST_CAPTIONS}")
    parser.add_argument("--scenes", type=int, metavar="N", help="render N scenes of the embedded dataset as images")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the figure; also .pdf and .svg")
    parser.add_argument(
        "--attention", choices=("last", "rollout", "none"), default="last",
        help="maps: of the last block, attention rollout through all blocks, or none [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=4, metavar="N", help="token maps per image [%(default)s]")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print all numbers as one json document")
    return parser.parse_args(argv)


def _check(given: argparse.Namespace) -> None:
    if (given.images is None) == (given.scenes is None):
        raise UserError("give either --images FILE ... or --scenes N (scenes of the embedded dataset)")
    if given.captions is None and given.scenes is None:
        raise UserError('--images needs --captions "..." ...')
    if given.out is None and not given.json:
        raise UserError("give --out FILE.png for a figure, --json for the numbers, or both")
    counts = {
        "--images": (len(given.images or []), 0, MOST_IMAGES),
        "--captions": (len(given.captions or []), 0, MOST_CAPTIONS),
        "--scenes": (1 if given.scenes is None else given.scenes, 1, MOST_IMAGES),
        "--tokens": (given.tokens, 1, MOST_TOKENS),
    }
    if given.seed < 0:
        raise UserError(f"--seed {given.seed}: expected 0 or more")
    for option, (value, least, most) in counts.items():
        if not least <= value <= most:
            raise UserError(f"{option}: {value} given, expected {max(1, least)} to {most}; more would not be legible")
    if given.out is not None and given.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {str(given.out)!r}: expected a name that ends in .png, .pdf or .svg")
    if given.out is not None and not given.out.absolute().parent.is_dir():
        raise UserError(f"--out {str(given.out)!r}: the folder {str(given.out.parent)!r} is not there")


def _as_table(explanation: Explanation) -> str:
    from llip.tools.fonts import shorten

    captions = [shorten(caption, _CAPTION) for caption in explanation.captions]
    width = max(map(len, captions))
    names = [name if len(name) <= 20 else "..." + name[-17:] for name in explanation.names]
    lines = [" " * width + "  " + "  ".join(f"{name:>10}" for name in names)]
    for j, caption in enumerate(captions):
        cells = (f"{explanation.scores[i, j]:{max(10, len(name))}.3f}" for i, name in enumerate(names))
        lines.append(f"{caption:{width}}  " + "  ".join(cells))
    return "\n".join([*lines, *explanation.notes])


@program
def main(argv: Sequence[str]) -> None:
    """Explain images and captions: write the figure, print the numbers."""
    given = parse_arguments(argv)
    _check(given)
    from llip.tools.explain.explanation import explain
    from llip.tools.explain.figure import draw
    from llip.tools.explain.inputs import draw_scenes, read_image
    from llip.tools.fonts import missing_note

    images = [read_image(path) for path in given.images or []]
    captions, names = given.captions, [path.name for path in given.images or []]
    model = open_on_device(given.model, given.pretrained, given.tokenizer, given.device)
    if given.scenes is not None:
        images, captions = draw_scenes(given.scenes, max(48, model.visual.image_size[0]), given.seed)
        captions = given.captions or captions
        names = [f"scene {index}" for index in range(given.scenes)]
    explanation = explain(model, images, names, captions, given.attention)
    if given.out is not None:
        draw(explanation, images, given.out, given.tokens)
        if note := missing_note([*names, *captions]):
            print(f"note: {note}", file=sys.stderr)
        print(f"wrote {given.out}", file=sys.stderr)
    print(json.dumps(explanation.to_dict(given.tokens)) if given.json else _as_table(explanation))


if __name__ == "__main__":
    sys.exit(main())
