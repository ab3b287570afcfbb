"""Hashes of what a task is evaluated on: its result is kept as long as they stay the same."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.datasets import files_below

TEXTS = {".txt", ".json", ".jsonl", ".csv", ".tsv"}
CHEAP = 1 << 20
"""Largest text file, in bytes, that is compared by content; other files are compared by size and time."""


def task_inputs(entry: Entry) -> dict[str, str]:
    """Return part -> what identifies it: the entry, its texts, and the data files by name, size and time."""
    contents = {field: source.content() for field, source in entry.texts.items()}
    return {
        "entry": entry.fingerprint,
        **{field: hashlib.sha256(text.encode()).hexdigest()[:16] for field, text in contents.items()},
        "data files": _describe_files(entry),
    }


def changed_parts(stored: Mapping[str, str] | None, inputs: Mapping[str, str]) -> list[str]:
    """Describe what differs between the inputs of a stored result and the current ones; texts before the entry."""
    if stored is None:
        return ["its inputs are not recorded"]
    names = [name for name in [*inputs, *(set(stored) - set(inputs))] if stored.get(name) != inputs.get(name)]
    if len(names) > 1 and "entry" in names and set(names) & {"classnames", "prompts", "class_keys"}:
        names.remove("entry")  # its fingerprint covers the texts
    words = {"data files": f"data files changed ({stored.get('data files')} -> {inputs.get('data files')})"}
    return [words.get(name, f"{name} changed") for name in names]


def _describe_files(entry: Entry) -> str:
    digest, count, size = hashlib.sha256(), 0, 0
    for root, path in sorted(set(_data_files(entry))):
        try:
            status = os.stat(path)
            cheap = Path(path).suffix.lower() in TEXTS and status.st_size <= CHEAP
            identity = hashlib.sha256(Path(path).read_bytes()).hexdigest() if cheap else status.st_mtime_ns
        except OSError as error:  # a broken link, or a file of another user
            identity, status = str(error.strerror), None
        count, size = count + 1, size + (status.st_size if status else 0)
        digest.update(json.dumps([os.path.relpath(path, root), status and status.st_size, identity]).encode())
    return f"{count} files, {size} bytes, {digest.hexdigest()[:16]}"


def _data_files(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield (root, path) of the dataset's files: below its split if it is a folder, and those beside it."""
    location, split = entry.data.location(), getattr(entry.data, "split", "")
    others = [getattr(entry.data, field.name) for field in fields(entry.data) if field.name != "path"]
    for root in [location, *(other for other in others if isinstance(other, Path) and other != location)]:
        if root is None or not root.exists():
            continue
        if not root.is_dir():
            yield str(root.parent), str(root)
        elif split and root == location and (root / split).is_dir():
            yield from ((str(root), file.path) for file in os.scandir(root) if not file.is_dir())
            yield from ((str(root), path) for path in files_below(root / split))
        else:
            yield from ((str(root), path) for path in files_below(root))
