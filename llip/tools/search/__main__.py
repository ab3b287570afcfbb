"""`llip search index DIR --checkpoint C` and `llip search query INDEX "a red star"`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llip.errors import UserError
from llip.system.program import program

if TYPE_CHECKING:  # imports torch, which takes seconds: not for --help
    from llip.clipeval.zero_shot import Scorer

DEFAULT_NAME = ".llip_index"
"""The index's folder inside the image folder, unless `--out` says where."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="llip search", description="Find images of a folder by a text.")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a folder, or what has changed in it")
    index.add_argument("folder", type=Path, metavar="DIR", help="images, also in folders below")
    index.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint that this project wrote")
    index.add_argument("--out", type=Path, metavar="INDEX", help=f"folder of the index [DIR/{DEFAULT_NAME}]")
    index.add_argument("--workers", type=int, default=0, metavar="N", help="decoding processes [%(default)s]")
    index.add_argument("--half", action="store_true", help="keep half precision: half the disk, scores within 1e-3")
    query = commands.add_parser("query", help="find the images that fit a text best")
    query.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    query.add_argument("text", help="what to look for")
    query.add_argument("--top", type=int, default=20, metavar="N", help="answers [%(default)s]")
    query.add_argument("--shortlist", type=int, default=2048, metavar="N", help="images scored exactly [%(default)s]")
    query.add_argument("--exact", action="store_true", help="score every image exactly")
    query.add_argument("--checkpoint", type=Path, help="where the checkpoint is now, if it has moved")
    query.add_argument("--out", type=Path, metavar="SHEET.png", help="write the answers as a contact sheet")
    query.add_argument("--html", type=Path, metavar="PAGE.html", help="write the answers as a page")
    for command in (index, query):
        command.add_argument("--device", default="cpu", help="cpu or cuda [%(default)s]")
        command.add_argument("--json", action="store_true", help="print one json document")
    return parser.parse_args(argv)


def _scorer(checkpoint: Path, device_name: str) -> Scorer:
    import torch

    from llip.clipeval.zero_shot import Scorer
    from llip.open_clip.factory import load_pretrained

    model = load_pretrained(checkpoint)
    try:
        device = torch.device(device_name)
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device_name}: {error}") from error
    return Scorer(model, model.preprocess_val, model.tokenizer, device)


def _index(given: argparse.Namespace) -> None:
    if given.workers < 0:
        raise UserError(f"--workers {given.workers}: expected 0 or more")
    if not given.folder.is_dir():
        raise UserError(f"image folder {str(given.folder)!r} is not there")
    from llip.tools.search.build import build_index

    out = given.out or given.folder / DEFAULT_NAME
    scorer = _scorer(given.checkpoint, given.device)
    report = build_index(given.folder, given.checkpoint, out, scorer, given.workers, given.half)
    if given.json:
        print(json.dumps({"index": str(out), **report.to_dict()}))
        return
    print(
        f"{out}: {report.indexed:,} images ({report.new:,} new, {report.changed:,} changed, {report.deleted:,} deleted)"
    )
    if report.damaged:
        print(f"{len(report.damaged):,} damaged images left out:")
        for path, reason in report.damaged.items():
            print(f"  {path}: {reason}")


def _query(given: argparse.Namespace) -> None:
    for option, value in (("--top", given.top), ("--shortlist", given.shortlist)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    from llip.tools.search.query import Searcher
    from llip.tools.search.show import contact_sheet, html_page
    from llip.tools.search.store import check_model, hash_model, open_index

    index = open_index(given.index)
    checkpoint = given.checkpoint or index.checkpoint
    if given.checkpoint is None and not checkpoint.exists():
        raise UserError(f"the checkpoint {str(checkpoint)!r} of the index is gone; say where it is with --checkpoint")
    scorer = _scorer(checkpoint, given.device)
    check_model(index, hash_model(scorer.model), checkpoint)
    hits = Searcher(index, scorer).search(given.text, given.top, None if given.exact else given.shortlist)
    if given.out is not None:
        contact_sheet(given.text, hits, index.folder, given.out)
    if given.html is not None:
        html_page(given.text, hits, index.folder, given.html)
    if given.json:
        print(json.dumps({"query": given.text, "hits": [{"path": str(hit.path), "score": hit.score} for hit in hits]}))
        return
    print("\n".join(f"{number:3}  {hit.score:6.3f}  {hit.path}" for number, hit in enumerate(hits, 1)))


@program
def main(argv: Sequence[str]) -> None:
    """Run `index` or `query`. An index that was interrupted is resumed by the same command."""
    given = parse_arguments(argv)
    {"index": _index, "query": _query}[given.command](given)


if __name__ == "__main__":
    sys.exit(main())
