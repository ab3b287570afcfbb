"""One shard -> its raw samples, with all damage named.

A shard is a tar (also gzip, bzip2 or xz) from a path, a `pipe:` command or a URL. Neighbouring members with one key
make a sample, by webdataset's convention: the key is the path up to the first dot of the file's name, the rest is the
suffix, in lower case. Damage never raises: it comes as a `Damage` among the samples, in order, so that what is counted
does not depend on threads.
"""

import dataclasses
import itertools
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from llip.data.prefetch import ReadWatch
from llip.data.shard_file import (
    BAD_HEADER,
    COMMAND_FAILED,
    CORRUPT,
    DOWNLOAD_FAILED,
    LARGEST,
    MISSING,
    NOT_A_TAR,
    STALLED,
    TRUNCATED,
    UNREADABLE,
    ZERO_BYTES,
    ZSTD,
    ShardError,
    ShardFile,
)

DUPLICATE = "duplicate member"
LOSES_SHARD = frozenset(
    (MISSING, UNREADABLE, ZERO_BYTES, NOT_A_TAR, TRUNCATED, BAD_HEADER, ZSTD, COMMAND_FAILED, DOWNLOAD_FAILED, STALLED)
)
"""Reasons for which a shard, or the rest of it, yields no more samples."""

_ERRORS = "backslashreplace"  # names that are not UTF-8 become text that can be hashed and printed
_META = re.compile(r"__[^/]*__($|/)")

RawSample = dict[str, Any]
"""Suffix -> bytes, and the strings `__key__` and `__url__`."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """Something of a shard that cannot be used. `reason` is a fixed phrase."""

    url: str
    reason: str
    detail: str = ""


class _Member(NamedTuple):
    key: str
    suffix: str
    name: str
    size: int


class _Header(tarfile.TarInfo):
    """A header as tarfile parses it; of a plain one only what a sample needs, which takes a third of the time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse one block.

        Raises:
            tarfile.HeaderError: it is no header.
        """
        plain = buf[156:157] in (tarfile.REGTYPE, tarfile.XHDTYPE) and buf[0] and not buf[345]  # no prefix of the name
        try:
            if plain and 256 + sum(buf[:148]) + sum(buf[156:]) == int(buf[148:156].split(b"\0")[0], 8):
                header = cls(bytes(buf[:100]).split(b"\0", 1)[0].decode(encoding, errors))
                header.type, header.size = bytes(buf[156:157]), int(buf[124:136].strip(b" \0"), 8)
                return header
        except ValueError:
            pass  # tarfile knows more forms of a number, and what is wrong
        return super().frombuf(buf, encoding, errors)


class _Archive(tarfile.TarFile):
    """Holds what tarfile's header parser remembers between members."""

    def next(self) -> None:
        """Read nothing: `TarFile` itself takes a damaged header for the end of the archive."""


def read_samples(
    url: str, skip: int = 0, watch: ReadWatch | None = None, headers_only: bool = False
) -> Iterator[RawSample | Damage]:
    """Yield the samples of one shard in their order, and a `Damage` for each thing that is wrong with it.

    A shard that breaks off gives its whole samples before that; the one that is cut is not among them. Members that are
    no files, hidden files and webdataset's `__meta__` names are skipped.

    Args:
        url: a path, `pipe:COMMAND`, or a URL.
        skip: samples to skip; in a local file their bytes are not read. Damage among them is still reported.
        watch: notified of every read, for `read_ahead`.
        headers_only: leave every member empty; in a local file its bytes are not read.
    """
    file = None
    try:
        file = ShardFile(url, watch or ReadWatch())
        try:
            yield from _samples(file, url, skip, headers_only)
        except (ShardError, OSError, EOFError, *CORRUPT):
            file.finish()  # a command that failed is the reason for what it left out
            raise
        file.finish()
    except ShardError as error:
        yield Damage(url, error.reason, error.detail)
    except (FileNotFoundError, NotADirectoryError):
        yield Damage(url, MISSING)
    except EOFError as error:
        yield Damage(url, TRUNCATED, str(error))
    except (OSError, ValueError, *CORRUPT) as error:
        yield Damage(url, UNREADABLE, getattr(error, "strerror", None) or str(error))
    finally:
        if file is not None:
            file.close()


def _samples(file: ShardFile, url: str, skip: int, headers_only: bool) -> Iterator[RawSample | Damage]:
    """Yield the samples after the first `skip`, and a `Damage` for each with a member twice, which counts as none."""
    for key, members in itertools.groupby(_members(file), lambda member: member.key):
        sample: RawSample = {"__key__": key, "__url__": url}
        duplicate = ""
        for member in members:
            if member.suffix in sample:
                duplicate = member.name
            sample[member.suffix] = b"" if skip > 0 or headers_only else file.read(member.size)
        if duplicate:
            yield Damage(url, DUPLICATE, duplicate)
        elif skip > 0:
            skip -= 1
        else:
            yield sample


def _members(file: ShardFile) -> Iterator[_Member]:
    """Yield the members that belong to samples, each with `file` at its data, which need not be read."""
    stream: Any = file  # of what a file can do, headers take `read` and `tell`
    archive = _Archive(fileobj=stream, encoding="utf-8", errors=_ERRORS)
    while True:
        try:
            header = _Header.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros ends the archive
            return
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise ShardError(NOT_A_TAR if file.position <= tarfile.BLOCKSIZE else BAD_HEADER, str(error)) from error
        if header.isreg() and not header.issparse() and header.size <= LARGEST and (parts := split_name(header.name)):
            yield _Member(*parts, header.name, header.size)
        rest = archive.offset - file.position
        if rest < 0:
            raise ShardError(BAD_HEADER, f"member of {header.size} bytes")
        file.skip(rest)


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member's name, or None for one that belongs to no sample (no dot, hidden, __meta__)."""
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()
