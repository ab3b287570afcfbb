"""What a catalog finds on this machine: `llip catalog --check [CATALOG] [--json]`.

Each dataset is opened and counted, its class names and prompts are read, and its first image is decoded. Exit code: 0
if all that is there is right (a missing dataset is no mistake), 1 if something that is there is wrong, 2 for a
mistake in the request.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from llip.clipeval.catalog.catalog import DEFAULT_CATALOG, Catalog, Entry, load_catalog
from llip.clipeval.catalog.opening import check_size, check_targets, labels_of
from llip.clipeval.datasets import ImageSource
from llip.clipeval.metrics import CLASSIFICATION, check_metrics
from llip.errors import UserError
from llip.open_clip.pixels import to_rgb
from llip.system.program import program
from llip.system.tables import aligned_table

RIGHT, WRONG, MISSING = "right", "wrong", "missing"
EXIT_WRONG = 1


@dataclass(frozen=True)
class Finding:
    """What is on this machine of one entry.

    Attributes:
        status: right, wrong, or missing (nothing of it is here).
        classes, images: how many there are; None if unknown.
        problem: what is wrong, or None.
    """

    entry: Entry
    status: str
    classes: int | None
    images: int | None
    problem: str | None

    @property
    def location(self) -> str | None:
        """Where the dataset was looked for; None for one that is no file."""
        location = self.entry.data.location()
        return None if location is None else str(location)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `expected_*` as the entry states, None if it does not."""
        entry = self.entry
        fields = ("status", "location", "classes", "images", "problem")
        return {
            **{name: getattr(entry, name) for name in ("type", "metric", "source", "download")},
            **{name: getattr(self, name) for name in fields},
            "expected_classes": entry.num_classes,
            "expected_images": entry.num_images,
        }


def check_entry(entry: Entry) -> Finding:
    """Look for one dataset and compare it with its entry."""
    status, classes, images, problem = RIGHT, None, None, None
    try:
        if entry.data.exists():
            source = entry.data.open()
            images, classes = len(source), source.classnames and len(source.classnames)
            check_size(entry, source)
            classes = _check_opened(entry, source)
        else:
            status = MISSING
            for field, texts in entry.texts.items():  # a missing package is reported before a download
                if texts.kind != "dataset":
                    texts.read(None, field)
    except Exception as error:  # of any kind: a damaged dataset must not end the check of the others
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        status = WRONG if status == RIGHT else MISSING
    return Finding(entry, status, classes or None, images, problem)


def _check_opened(entry: Entry, source: ImageSource) -> int | None:
    """Check all that can be wrong without a model and return the number of classes (None in retrieval)."""
    labels = labels_of(entry, source) if entry.kind == CLASSIFICATION else None
    if labels is not None:
        check_targets(source, labels)
        check_metrics(entry.metrics, len(labels.classnames), source.multi_label)
    try:
        image, _ = source.load(0)
        to_rgb(image)
    except Exception as error:
        raise UserError(
            f"the first image, {source.name(0)}, cannot be read: {type(error).__name__}: {error}"
        ) from error
    return None if labels is None else len(labels.classnames)


def check_catalog(catalog: Catalog, tasks: Sequence[str] | None = None, progress: bool = False) -> list[Finding]:
    """Check the entries of `tasks` (None: all), in their order.

    Raises:
        UserError: an unknown task.
    """
    entries = catalog.select(tasks)
    return [check_entry(entry) for entry in tqdm(entries, desc="datasets", disable=not progress, leave=False)]


def as_text(findings: Sequence[Finding]) -> str:
    """Return a table of all entries, then what is wrong and what is missing, with where to get it."""
    rows = [["task", "status", "classes", "images", "metric", "location"]]
    for each in findings:
        entry = each.entry
        counts = [_count(each.classes, entry.num_classes), _count(each.images, entry.num_images)]
        rows.append([entry.name, each.status, *counts, ", ".join(entry.metrics), each.location or "(in a package)"])
    parts = [aligned_table(rows, words=len(rows[0]))]
    for status, heading in ((WRONG, "wrong:"), (MISSING, "missing, and where to get it:")):
        lines = [_line(each) for each in findings if each.status == status]
        parts += ["\n".join([heading, *lines])] if lines else []
    counts = [f"{sum(each.status == status for each in findings)} {status}" for status in (RIGHT, WRONG, MISSING)]
    return "\n\n".join([*parts, ", ".join(counts)])


def _count(number: int | None, expected: int | None) -> str:
    shown = "-" if number is None else f"{number}"
    return shown if expected is None else f"{shown} of {expected}"


def _line(finding: Finding) -> str:
    entry, problem = finding.entry, finding.problem
    if finding.status == WRONG:
        lines = [f"  {entry.name}: {problem}", *([f"it comes from {entry.source}"] if entry.source else [])]
    else:
        lines = [f"  {entry.name}: {entry.source or 'the entry does not say (field source)'}"]
        lines += [f"also: {problem}"] if problem else []
    return "\n      ".join([*lines, *([entry.download] if entry.download else [])])


@program
def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="llip catalog",
        description="List which datasets of a catalog are on this machine, and where to get the others.",
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
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    arguments = parser.parse_args(argv)
    catalog = load_catalog(arguments.check)
    findings = check_catalog(catalog, arguments.tasks, progress=sys.stderr.isatty())
    if arguments.json:
        tasks = {each.entry.name: each.to_json() for each in findings}
        print(json.dumps({"catalog": str(catalog.path), "tasks": tasks}, ensure_ascii=False))
    else:
        print(as_text(findings))
    return EXIT_WRONG if any(each.status == WRONG for each in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
