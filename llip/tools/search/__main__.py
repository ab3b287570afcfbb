"""`llip search index DIR --checkpoint MODEL` and `llip search query INDEX "a red star"`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llip.errors import UserError
from llip.system.program import program
from llip.tools.models import MODEL_HELP, add_model_options, open_on_device

if TYPE_CHECKING:  # imports torch, which takes seconds: not for --help
    from llip.clipeval.scorer import Scorer
    from llip.open_clip.model import Llip

DEFAULT_NAME = ".llip_index"
"""The index's folder inside the image folder, unless `--out` names another."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="llip search", description="Find images in a folder by text.")
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a folder, or update its index")
    index.add_argument("folder", type=Path, metavar="DIR", help="images, subfolders included")
    index.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL_HELP)
    index.add_argument("--out", type=Path, metavar="INDEX", help=f"folder of the index [DIR/{DEFAULT_NAME}]")
    index.add_argument("--workers", type=int, default=0, metavar="N", help="decoding processes [%(default)s]")
    index.add_argument("--half", action="store_true", help="store half precision: half the disk, scores within 1e-3")
    query = commands.add_parser("query", help="list the images that match a text best")
    query.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    query.add_argument("text", help="the query")
    query.add_argument("--top", type=int, default=20, metavar="N", help="images listed [%(default)s]")
    query.add_argument("--shortlist", type=int, default=2048, metavar="N", help="images scored exactly [%(default)s]")
    query.add_argument("--exact", action="store_true", help="score every image exactly")
    query.add_argument("--checkpoint", metavar="MODEL", help="the model, if it has moved")
    query.add_argument("--folder", type=Path, metavar="DIR", help="the image folder, if it has moved")
    query.add_argument("--out", type=Path, metavar="SHEET.png", help="write the images as a contact sheet")
    query.add_argument("--html", type=Path, metavar="PAGE.html", help="write the images as a web page")
    for command in (index, query):
        add_model_options(command)
        command.add_argument("--json", action="store_true", help="print one json document")
    return parser.parse_args(argv)


def _scorer(model: Llip, given: argparse.Namespace) -> Scorer:
    import torch

    from llip.clipeval.scorer import Scorer

    return Scorer(model, model.preprocess_val, model.tokenizer, torch.device(given.device))


def _index(given: argparse.Namespace) -> None:
    if given.workers < 0:
        raise UserError(f"--workers {given.workers}: expected 0 or more")
    if not given.folder.is_dir():
        raise UserError(f"image folder {str(given.folder)!r} is not there")
    from llip.tools.search.build import build_index
    from llip.tools.search.store import ModelSource

    out = given.out or given.folder / DEFAULT_NAME
    source = ModelSource.of(given.checkpoint, given.pretrained)
    model = open_on_device(source.model, source.pretrained, given.tokenizer, given.device)
    report = build_index(given.folder, source, out, _scorer(model, given), given.workers, given.half)
    if given.json:
        print(json.dumps({"index": str(out), **dataclasses.asdict(report)}))
        return
    print(
        f"{out}: {report.indexed:,} images ({report.new:,} new, {report.changed:,} changed, {report.deleted:,} deleted)"
    )
    if report.damaged:
        print(f"{len(report.damaged):,} damaged images skipped:")
        for path, reason in report.damaged.items():
            print(f"  {path}: {reason}")


def _query(given: argparse.Namespace) -> None:
    for option, value in (("--top", given.top), ("--shortlist", given.shortlist)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    from llip.tools.fonts import missing_note
    from llip.tools.search.query import Searcher
    from llip.tools.search.show import contact_sheet, html_page, relative
    from llip.tools.search.store import ModelSource, check_model, hash_model, open_index

    index = open_index(given.index)
    index.folder = given.folder.resolve() if given.folder else index.folder
    if not index.folder.is_dir():
        raise UserError(f"the image folder {str(index.folder)!r} of the index is not there; name it with --folder DIR")
    source = ModelSource.of(given.checkpoint, given.pretrained) if given.checkpoint else index.source
    if Path(source.model).is_absolute() and not Path(source.model).exists():
        raise UserError(f"the checkpoint {source.model!r} of the index is not there; name it with --checkpoint")
    model = open_on_device(source.model, source.pretrained, given.tokenizer, given.device)
    check_model(index, hash_model(model), source)
    hits = Searcher(index, _scorer(model, given)).search(
        given.text, given.top, None if given.exact else given.shortlist
    )
    if given.out is not None:
        contact_sheet(given.text, hits, index.folder, given.out)
        if note := missing_note([given.text, *(relative(hit.path, index.folder) for hit in hits)]):
            print(f"note: {note}", file=sys.stderr)
    if given.html is not None:
        html_page(given.text, hits, index.folder, given.html)
    if gone := [hit.path for hit in hits if not hit.path.is_file()]:
        print(
            f"note: {len(gone)} of the {len(hits)} images are no longer there, first {str(gone[0])!r}; update the "
            f"index: llip search index {index.folder} --checkpoint {source.model} --out {given.index}",
            file=sys.stderr,
        )
    if given.json:
        answers = [{"path": str(hit.path), "score": hit.score, "missing": hit.path in gone} for hit in hits]
        print(json.dumps({"query": given.text, "hits": answers}))
        return
    print("\n".join(f"{number:3}  {hit.score:6.3f}  {hit.path}" for number, hit in enumerate(hits, 1)))


@program
def main(argv: Sequence[str]) -> None:
    """Run `index` or `query`. An index that was interrupted is resumed by the same command."""
    given = parse_arguments(argv)
    {"index": _index, "query": _query}[given.command](given)


if __name__ == "__main__":
    sys.exit(main())
