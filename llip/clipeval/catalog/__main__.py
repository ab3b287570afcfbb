"""What a catalog finds on this machine: `llip catalog --check [CATALOG] [--json]`.

Each dataset is opened and counted, its class names and prompts are read, and its first image is decoded. Exit code: 0
when all that is there is right (a missing dataset is no mistake), 1 when something that is there is wrong, 2 when the
request itself is at fault.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from llip.clipeval.catalog.catalog import DEFAULT_CATALOG, Catalog, Entry, load_catalog
from llip.clipeval.catalog.opening import check_size, check_targets, labels_of
from llip.clipeval.datasets import ImageSource
from llip.clipeval.metrics import CLASSIFICATION
from llip.errors import UserError
from llip.open_clip.pixels import to_rgb
from llip.system.program import program

RIGHT, WRONG, MISSING = "right", "wrong", "missing"
EXIT_WRONG = 1


@dataclass(frozen=True)
class Finding:
    """What is on this machine of one entry.

    Attributes:
        status: right, wrong, or missing (nothing of it is here).
        location: where it was looked for; None for a dataset that is no file.
        classes, images: found; None if unknown. expected_*: as the entry states, None if it does not.
        problem: what is wrong, or None.
        source, download: where it comes from.
    """

    task: str
    type: str
    metric: str
    status: str
    location: str | None
    classes: int | None
    expected_classes: int | None
    images: int | None
    expected_images: int | None
    problem: str | None
    source: str | None
    download: str | None


def check_entry(entry: Entry) -> Finding:
    """Look for one dataset, and hold it against its entry."""
    found: dict[str, Any] = {"status": RIGHT, "classes": None, "images": None, "problem": None}
    try:
        if entry.data.found():
            source = entry.data.open()
            found |= {"images": len(source), "classes": source.classnames and len(source.classnames)}
            check_size(entry, source)
            found["classes"] = _checked(entry, source)
        else:
            found["status"] = MISSING
            _check_texts(entry)
    except Exception as error:  # of any kind: a damaged dataset must not end the check of the others
        found["problem"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        found["status"] = WRONG if found["status"] == RIGHT else MISSING
    location = entry.data.location()
    return Finding(
        task=entry.name,
        type=entry.type,
        metric=entry.metric,
        location=None if location is None else str(location),
        expected_classes=entry.num_classes,
        expected_images=entry.num_images,
        source=entry.source,
        download=entry.download,
        **found,
    )


def _checked(entry: Entry, source: ImageSource) -> int | None:
    """Return the number of classes (None in retrieval) after a look at all that can be wrong without a model."""
    labels = labels_of(entry, source) if entry.kind == CLASSIFICATION else None
    if labels is not None:
        check_targets(source, labels)
    try:
        image, _ = source.load(0)
        to_rgb(image)
    except Exception as error:
        raise UserError(
            f"the first image, {source.name(0)}, cannot be read: {type(error).__name__}: {error}"
        ) from error
    return None if labels is None else len(labels.classnames)


def _check_texts(entry: Entry) -> None:
    """Read class names and prompts that need no dataset: a missing package is reported before a download."""
    for source, what in (
        (entry.classnames, "classnames"),
        (entry.prompts, "prompts"),
        (entry.class_keys, "class_keys"),
    ):
        if entry.kind == CLASSIFICATION and source is not None and source.kind != "dataset":
            source.read(None, what)


def check_catalog(catalog: Catalog, tasks: Sequence[str] | None = None, progress: bool = False) -> list[Finding]:
    """Check the entries of `tasks` (None: all), in their order.

    Raises:
        UserError: an unknown task.
    """
    entries = catalog.select(tasks)
    return [check_entry(entry) for entry in tqdm(entries, desc="datasets", disable=not progress, leave=False)]


def as_text(findings: Sequence[Finding]) -> str:
    """Return a table of what was found, then what is wrong and what is missing, with where to get it."""
    rows = [["task", "status", "classes", "images", "metric", "looked for in"]]
    for one in findings:
        counts = [_count(one.classes, one.expected_classes), _count(one.images, one.expected_images)]
        rows.append([one.task, one.status, *counts, one.metric, one.location or "(in a package)"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    parts = ["\n".join(table)]
    for status, heading in ((WRONG, "wrong:"), (MISSING, "missing, and where to get it:")):
        lines = [_line(one) for one in findings if one.status == status]
        parts += ["\n".join([heading, *lines])] if lines else []
    counts = [f"{sum(one.status == status for one in findings)} {status}" for status in (RIGHT, WRONG, MISSING)]
    return "\n\n".join([*parts, ", ".join(counts)])


def _count(found: int | None, expected: int | None) -> str:
    """Return `found of expected`, with what is not known left out."""
    if expected is None:
        return "-" if found is None else f"{found}"
    return f"{'-' if found is None else found} of {expected}"


def _line(one: Finding) -> str:
    source = one.source or "the entry does not say (field source)"
    if one.status == WRONG:
        lines = [f"  {one.task}: {one.problem}", *([f"it comes from {one.source}"] if one.source else [])]
    else:
        lines = [f"  {one.task}: {source}", *([f"also: {one.problem}"] if one.problem else [])]
    return "\n      ".join([*lines, *([one.download] if one.download else [])])


@program
def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="llip catalog",
        description="Tell for each dataset of a catalog what is on this machine, and where to get what is not.",
        epilog="Exit code: 0 all that is there is right, 1 something there is wrong, 2 a mistake in the request.",
    )
    parser.add_argument(
        "--check",
        nargs="?",
        const=DEFAULT_CATALOG,
        required=True,
        metavar="CATALOG",
        help=f"a catalog of llip.clipeval or a path to a json [{DEFAULT_CATALOG}]",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks alone")
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    arguments = parser.parse_args(argv)
    catalog = load_catalog(arguments.check)
    findings = check_catalog(catalog, arguments.tasks, progress=sys.stderr.isatty())
    if arguments.json:
        tasks = {one.task: dataclasses.asdict(one) for one in findings}
        print(json.dumps({"catalog": str(catalog.path), "tasks": tasks}, ensure_ascii=False))
    else:
        print(as_text(findings))
    return EXIT_WRONG if any(one.status == WRONG for one in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
