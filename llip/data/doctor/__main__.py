"""Validate shards before training: contents, damage, and the values for the config.

    llip doctor '/data/{00000..00099}.tar' [--index]

Exit code: 0 all samples are usable, 1 damage found, 2 a mistake in the request.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from llip.errors import UserError
from llip.system.program import program

if TYPE_CHECKING:  # these import torch, which takes seconds: not for --help
    from llip.data.doctor.report import Totals
    from llip.data.doctor.scan import ScanSettings, ShardFindings

_MOST_WORKERS = 512


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="llip doctor",
        description="Validate training shards: contents, damage, and the values for the config.",
        epilog="Exit code: 0 all usable, 1 damage found, 2 a mistake in the request.",
    )
    parser.add_argument("pattern", nargs="+", metavar="PATTERN", help="as train_data; quoted, or the shell expands it")
    parser.add_argument("--index", action="store_true", help="write the sample counts beside the shards")
    parser.add_argument("--index-dir", metavar="DIR", help="write them into DIR instead")
    parser.add_argument(
        "--caption-keys", metavar="KEYS", help="as caption_keys [every source that looks like captions]"
    )
    parser.add_argument(
        "--image-checks",
        choices=("full", "header"),
        default="full",
        help="decode images, or read headers only [%(default)s]",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes [one per core]")
    parser.add_argument("--context-length", type=int, default=77, metavar="TOKENS", help="of the model [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one json document instead of a table")
    return parser.parse_args(argv)


@program
def main(argv: Sequence[str]) -> int:
    """Validate the shards that the command line names; return the exit code."""
    arguments = parse_arguments(argv)
    urls = _find_shards(arguments)
    from llip.data.doctor.report import Totals, as_table
    from llip.data.doctor.scan import ScanSettings
    from llip.system.cores import usable_cores

    settings = ScanSettings(arguments.caption_keys, arguments.image_checks == "full", arguments.context_length)
    totals = Totals(urls, settings)
    entries = {}
    for shard in _with_progress(urls, settings, arguments.workers or usable_cores(), totals):
        if shard.entry is not None:
            entries[shard.url] = dataclasses.replace(shard.entry, samples=shard.samples)
    report = totals.report(arguments.pattern[0])
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(as_table(report))
    if arguments.index or arguments.index_dir:
        _write_index(entries, report.damaged_shards, arguments.index_dir)
    return 1 if report.damage else 0


def _find_shards(arguments: argparse.Namespace) -> list[str]:
    """Return the shards, each once; mistakes in the request raise before anything slow happens."""
    from llip.data.captions import parse_caption_keys
    from llip.data.sources import check_shards_exist, is_local, parse_train_data

    if len(arguments.pattern) > 1:
        raise UserError(
            f"{len(arguments.pattern)} patterns given; quote the pattern, so that the shell does not expand it: "
            "llip doctor '/data/*.tar' (several are joined by a comma, or by ::)"
        )
    if not 0 <= arguments.workers <= _MOST_WORKERS:
        raise UserError(f"--workers {arguments.workers}: expected 0 to {_MOST_WORKERS}")
    if arguments.context_length < 3:
        raise UserError(f"--context-length {arguments.context_length}: expected 3 or more")
    if arguments.caption_keys is not None:
        parse_caption_keys(arguments.caption_keys)
    data = parse_train_data(arguments.pattern[0])
    urls = list(dict.fromkeys(data.urls))
    if arguments.index and not arguments.index_dir and not all(is_local(url) for url in urls):
        raise UserError("--index: shards that are not on this machine need a folder for the index, --index-dir DIR")
    if all(is_local(url) and (os.path.isdir(url) or not os.path.exists(url)) for url in urls):
        check_shards_exist(data)  # all missing: a wrong path; some missing: damage
    return urls


def _write_index(entries: dict, damaged: dict, folder: str | None) -> None:
    from llip.data.index import write_index

    counted = {
        url: dataclasses.replace(entry, damaged=sum(damaged[url].reasons.values()) if url in damaged else 0)
        for url, entry in entries.items()
    }
    for path in write_index(counted, folder):
        print(f"wrote {path}", file=sys.stderr)


def _with_progress(urls: list[str], settings: ScanSettings, workers: int, totals: Totals) -> Iterator[ShardFindings]:
    """Yield the findings of every shard, added to `totals`, under a progress bar."""
    from llip.data.doctor.pool import scan_shards

    samples: dict[str, int] = {}
    cases = 0
    with tqdm(total=len(urls), unit="shard", desc="doctor", mininterval=0.5, dynamic_ncols=True) as bar:
        for url, answer in scan_shards(urls, settings, workers):
            samples[url] = answer if isinstance(answer, int) else answer.samples
            if isinstance(answer, int):
                bar.set_postfix_str(f"{sum(samples.values()):,} samples, {cases:,} damaged")
                continue
            cases += answer.cases
            totals.add(answer)
            bar.update()
            yield answer
        bar.set_postfix_str(f"{sum(samples.values()):,} samples, {cases:,} damaged")


if __name__ == "__main__":
    sys.exit(main())
