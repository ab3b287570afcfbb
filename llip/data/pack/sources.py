"""Find the pairs of image and captions in a folder, a CSV or TSV, or a JSONL."""

import csv
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llip.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jp2", ".jxl", ".svg", ".tif", ".tiff")
IMAGE_COLUMNS = ("filepath", "image", "path", "file", "image_path", "file_name", "filename", "img")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "texts", "description")
_TABLES = (".csv", ".tsv")
_LINES = (".jsonl", ".ndjson")
_FIELD_LIMIT = 1 << 24  # characters of one field of a CSV; the default refuses long captions
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)

NO_CAPTION = "no caption"
NOT_UTF8 = "caption is not UTF-8"
IS_URL = "image is a URL; download it first, for instance with img2dataset"


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image file and its captions."""

    image: Path
    captions: tuple[str, ...]


@dataclasses.dataclass
class Source:
    """The pairs of a source. `several`: some images have a list of captions, or more than one."""

    pairs: list[Pair] = dataclasses.field(default_factory=list)
    several: bool = False
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # reason -> the first case
    seen: str = ""  # what was there, for a message

    def drop(self, reason: str, example: str) -> None:
        """Count a case that cannot be packed."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, example)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns (fields of a JSONL) of the image's path and the caption; None: the first of the usual names."""

    image: str | None = None
    caption: str | None = None


def find_pairs(source: Path, image_root: Path | None = None, columns: Columns | None = None) -> Source:
    """Find the pairs in `source`, in a fixed order.

    Args:
        source: a folder (images with NAME.txt or NAME.json beside them, subfolders too), a .csv, .tsv or .jsonl file.
        image_root: what relative paths in a file start from; None: the file's folder.
        columns: for a file.

    Raises:
        UserError: no such file, another kind of file, unknown columns, or a file that cannot be read.
    """
    if source.is_dir():
        return _from_folder(source)
    if not source.is_file():
        raise UserError(f"pack: {str(source)!r} is not there (looked from {Path.cwd()})")
    root, columns = image_root or source.parent, columns or Columns()
    if source.suffix.lower() in _TABLES:
        return _from_rows(_table_rows(source), root, columns, source)
    if source.suffix.lower() in _LINES:
        return _from_rows(_json_rows(source), root, columns, source)
    raise UserError(
        f"pack: cannot read {str(source)!r}; expected a folder, or a file that ends in {', '.join(_TABLES + _LINES)}"
    )


def _from_folder(folder: Path) -> Source:
    source = Source()
    suffixes: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            image = Path(parent, name)
            suffix = image.suffix.lower()
            suffixes[suffix or "without a suffix"] += 1
            if suffix in _OTHER_SUFFIXES:
                source.drop(f"format {suffix.removeprefix('.')} is not packed", str(image))
            elif suffix in IMAGE_SUFFIXES:
                _add_beside(image, source)
    source.seen = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8)) or "no file"
    return source


def _add_beside(image: Path, source: Source) -> None:
    """Add `image` with the captions in the .txt and the .json of its name, in this order."""
    captions: list[str] = []
    for suffix, read in ((".txt", lambda text: text), (".json", _captions_of_json)):
        beside = image.with_suffix(suffix)
        try:
            value = read(beside.read_bytes().decode("utf-8-sig"))
        except (FileNotFoundError, IsADirectoryError):
            continue
        except UnicodeDecodeError:
            return source.drop(NOT_UTF8, str(beside))
        except (json.JSONDecodeError, RecursionError):
            return source.drop("json cannot be read", str(beside))
        if not _is_caption(value):
            return source.drop("caption is neither a string nor a list of strings", str(beside))
        source.several |= isinstance(value, list)
        captions += [value] if isinstance(value, str) else value
    return _add(image, captions, source)


def _captions_of_json(text: str) -> Any:
    record = json.loads(text)
    if not isinstance(record, dict):
        return record
    return record.get(_guess(list(record), CAPTION_COLUMNS) or "", [])


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _add(image: Path, captions: Sequence[str], source: Source) -> None:
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:  # json can spell half of a surrogate pair
        return source.drop(NOT_UTF8, str(image))
    distinct = tuple(dict.fromkeys(stripped for caption in captions if (stripped := caption.strip())))
    if not distinct:
        return source.drop(NO_CAPTION, str(image))
    source.several |= len(distinct) > 1
    source.pairs.append(Pair(image, distinct))
    return None


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a CSV or TSV. OpenCLIP's .csv files are separated by tabs: the header decides."""
    csv.field_size_limit(_FIELD_LIMIT)
    line = 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header = file.readline()
            file.seek(0)
            tabs = path.suffix.lower() == ".tsv" or ("\t" in header and "," not in header)
            rows = csv.DictReader(file, delimiter="\t" if tabs else ",", restkey="", restval="")
            for row in rows:
                line = rows.line_num
                yield line, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"pack: {path} cannot be read after line {line}: {error} (expected UTF-8)") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else {}


def _from_rows(rows: Iterator[tuple[int, dict[str, Any]]], root: Path, columns: Columns, path: Path) -> Source:
    source = Source()
    captions: dict[str, list[str]] = {}  # by image, in the order of the file
    chosen: tuple[str, str] | None = None
    problem: UserError | None = None
    count = 0
    for line, row in rows:
        count += 1
        where = f"{path}:{line}"
        if not row:
            source.drop("line is not a json object", where)
            continue
        try:
            chosen = chosen or _choose(list(row), columns, path)
        except UserError as error:  # a JSONL may start with an odd line; raised if every line is odd
            problem = problem or error
            source.drop("line lacks the image or the caption", where)
            continue
        image, value = row.get(chosen[0]), row.get(chosen[1])
        if not isinstance(image, str) or not image.strip():
            source.drop("no image path", where)
        elif _URL.match(image):
            source.drop(IS_URL, where)
        elif value is None or not _is_caption(value):
            source.drop(NO_CAPTION if value is None else "caption is neither a string nor a list of strings", where)
        else:
            source.several |= isinstance(value, list)
            captions.setdefault(image.strip(), []).extend([value] if isinstance(value, str) else value)
    if chosen is None and problem is not None:
        raise problem
    for image, texts in captions.items():
        _add(root / image, texts, source)
    source.seen = f"{count} rows"
    return source


def _choose(names: list[str], columns: Columns, path: Path) -> tuple[str, str]:
    return (
        _column(names, columns.image, IMAGE_COLUMNS, path, "--image-column"),
        _column(names, columns.caption, CAPTION_COLUMNS, path, "--caption-column"),
    )


def _column(names: list[str], wanted: str | None, usual: tuple[str, ...], path: Path, option: str) -> str:
    if wanted is None:
        guess = _guess(names, usual)
        if guess is not None:
            return guess
        raise UserError(
            f"pack: {path} has none of the usual columns {', '.join(usual)}; it has {', '.join(map(repr, names))}. "
            f"Name the right one with {option} (a CSV needs a header)"
        )
    if wanted not in names:
        raise UserError(f"pack: {option} {wanted!r} is not a column of {path}.{did_you_mean(wanted, names)}")
    return wanted


def _guess(names: Sequence[str], usual: tuple[str, ...]) -> str | None:
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.strip().lower(), name)
    return next((folded[name] for name in usual if name in folded), None)
