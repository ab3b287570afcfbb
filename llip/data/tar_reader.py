"""One shard -> its raw samples, with all damage named.

A shard is a tar (also gzip, bzip2 or xz) from a path, a `pipe:` command, or any URL that webdataset opens. Neighbouring
members with one key make a sample, by webdataset's convention: the key is the path up to the first dot of the file's
name, the rest is the suffix, in lower case. Damage never raises: it comes as a `Damage` among the samples, in order, so
that what is counted does not depend on threads.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import re
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import webdataset

from llip.data.prefetch import EXIT_WAIT, ReadWatch
from llip.data.sources import is_local

MISSING = "shard is not there"
UNREADABLE = "shard cannot be read"
ZERO_BYTES = "shard has zero bytes"
NOT_A_TAR = "shard is not a tar"
TRUNCATED = "truncated tar"
BAD_HEADER = "damaged tar header"
COMMAND_FAILED = "shard command failed"
STALLED = "shard stalled"
DUPLICATE = "duplicate member"
LOSES_SHARD = frozenset((MISSING, UNREADABLE, ZERO_BYTES, NOT_A_TAR, TRUNCATED, BAD_HEADER, COMMAND_FAILED, STALLED))
"""Reasons for which a shard, or the rest of it, yields no more samples."""

_BLOCK = 512
_PIECE = 1 << 20  # bytes of one read: a slow stream is seen to move, and a wrong size cannot ask for all memory
_BUFFER = 1 << 17
_DRAIN = 1 << 20  # bytes read after the end of the tar to learn how the command ends
_ERRORS = "backslashreplace"  # names that are not UTF-8 become text that can be hashed and printed
_LARGEST = 1 << 28  # bytes of a member; what claims more is no picture
_NO_DATA = b"123456"  # links, devices, folders: their size counts no bytes
_FILES = b"07\0"
_LONG_NAME = b"xLK"  # headers that describe the next one: pax, GNU long name, GNU long link
_RENAMES = re.compile(rb" (path|size|GNU\.sparse[^=]*)=")
_META = re.compile(r"__[^/]*__($|/)")
_CORRUPT = (zlib.error, lzma.LZMAError)
_DECOMPRESS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))

RawSample = dict[str, Any]
"""Suffix -> bytes, and the strings `__key__` and `__url__`."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """Something of a shard that cannot be used. `reason` is one of this file's fixed phrases."""

    url: str
    reason: str
    detail: str = ""


class _Broken(Exception):
    """Ends the reading of one shard."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class _Stream:
    """The bytes of one shard, forward only, from a file or a command."""

    def __init__(self, url: str, watch: ReadWatch) -> None:
        self.watch = watch
        self.process: subprocess.Popen | None = None
        self.own_group = False
        self.size: int | None = None  # bytes of the shard, where they can be skipped unread
        watch.begin(url, None)
        self.file: Any = self._open(url)  # a stream of bytes; the decompressors' classes have no common type
        watch.begin(url, self.kill if self.process else None)
        for magic, opener in _DECOMPRESS:
            if hasattr(self.file, "peek") and self.file.peek(len(magic)).startswith(magic):
                self.file, self.size = opener(self.file), None
        watch.touch()

    def _open(self, url: str) -> IO[bytes]:
        if is_local(url):
            file = io.BufferedReader(io.FileIO(url), _BUFFER)
            self.size = os.fstat(file.fileno()).st_size
            return file
        if url.startswith("pipe:"):
            # Not through webdataset: a shell's children are only reached as a group, and its pipe raises as soon as
            # the command has failed, before what was written has been read.
            self.own_group = True
            self.process = subprocess.Popen(
                url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, bufsize=_BUFFER, process_group=0
            )
            assert self.process.stdout is not None
            return self.process.stdout
        self.opened = webdataset.gopen(url)  # kept: it closes its stream when it is collected
        self.process = getattr(self.opened, "proc", None)
        return self.opened.stream if self.process else self.opened

    def read(self, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end."""
        data = self.file.read(min(count, _PIECE))
        self.watch.touch()
        if count <= _PIECE or len(data) < _PIECE:
            return data
        pieces = [data]
        while (count := count - len(data)) > 0 and data:
            data = self.file.read(min(count, _PIECE))
            self.watch.touch()
            pieces.append(data)
        return b"".join(pieces)

    def skip(self, count: int) -> bool:
        """Pass over `count` bytes; False if the shard ends before."""
        self.watch.touch()
        if self.size is not None:
            return self.file.seek(count, io.SEEK_CUR) <= self.size
        while count > 0 and (data := self.read(min(count, _PIECE))):
            count -= len(data)
        return count == 0

    def finish(self) -> None:
        """Wait for the command's end.

        Raises:
            _Broken: it failed, or has not left in time.
        """
        if self.process is None:
            return
        with contextlib.suppress(OSError, EOFError, *_CORRUPT):
            if not self.skip_rest():
                return  # it would go on for ever: what comes after a tar is nobody's
        if self.watch.interrupted:
            raise _Broken(STALLED)
        try:
            code = self.process.wait(EXIT_WAIT)
        except subprocess.TimeoutExpired:
            raise _Broken(COMMAND_FAILED, f"not ended {EXIT_WAIT:.0f} s after its output") from None
        if code != 0:
            raise _Broken(COMMAND_FAILED, f"exit code {code}")

    def skip_rest(self) -> bool:
        """Read to the end of the stream; False if there is more than a tar's padding."""
        rest = _DRAIN
        while rest > 0:
            data = self.read(min(rest, _BUFFER))
            if not data:
                return True
            rest -= len(data)
        return False

    def kill(self) -> None:
        """End the command at once, with all that it has started."""
        assert self.process is not None, "only a command can be killed"
        with contextlib.suppress(ProcessLookupError):
            if self.own_group:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def close(self) -> None:
        """Leave the shard; a command that still runs is ended."""
        self.watch.begin(self.watch.url, None)
        if self.process is not None and self.process.poll() is None:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_WAIT)
        if self.process is not None and self.process.stdout:
            self.process.stdout.close()
        self.file.close()


def _header(stream: _Stream, padding: int, first: bool) -> tuple[str, int, bool] | None:
    """Read the next header, after `padding` bytes, and return (name, size, whether it is a file); None at the end.

    Plain headers are read here (tarfile takes four times as long); those of long names go to tarfile.
    """
    described = b""  # headers, with their data, that describe the member to come
    while True:
        block = stream.read(padding + _BLOCK)[padding:]
        if len(block) < _BLOCK:
            if first and not described:
                raise _Broken(NOT_A_TAR if block else ZERO_BYTES)
            raise _Broken(TRUNCATED)
        if not any(block):
            return None
        try:
            if sum(block[:148]) + sum(block[156:]) + 256 != int(block[148:156].split(b"\0")[0], 8):
                raise ValueError("checksum")
            kind = block[156:157]
            size = int(block[124:136].strip(b" \0") or b"0", 8) if block[124] < 0x80 else None
            if size is not None and size < 0:
                raise ValueError("size")
        except ValueError:
            raise _Broken(NOT_A_TAR if first and not described else BAD_HEADER) from None
        if kind == b"g" or (kind in _LONG_NAME and size is not None):
            body = _extended_body(stream, size)
            padding = -len(body) % _BLOCK
            if kind in b"LK" or _RENAMES.search(body):
                described += block + body + bytes(padding)
            continue
        if described or block[345] or size is None:
            return _parse_with_tarfile(described + block)
        name = block[:100].split(b"\0", 1)[0].decode("utf-8", _ERRORS)
        return name, 0 if kind in _NO_DATA else size, kind in _FILES and not name.endswith("/")


def _extended_body(stream: _Stream, size: int | None) -> bytes:
    if size is None or size > _PIECE:  # names and numbers are short
        raise _Broken(BAD_HEADER)
    body = stream.read(size)
    if len(body) < size:
        raise _Broken(TRUNCATED)
    return body


def _parse_with_tarfile(headers: bytes) -> tuple[str, int, bool]:
    try:
        with tarfile.open(fileobj=io.BytesIO(headers), mode="r:", encoding="utf-8", errors=_ERRORS) as tar:
            member = tar.next()
    except tarfile.TarError as error:
        raise _Broken(BAD_HEADER) from error
    if member is None or member.size < 0:
        raise _Broken(BAD_HEADER)
    return member.name, 0 if member.type in _NO_DATA else member.size, member.isreg() and not member.issparse()


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member's name, or None for one that belongs to no sample (no dot, hidden, __meta__)."""
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _groups(stream: _Stream, url: str, skip: int) -> Iterator[RawSample | Damage]:
    """Yield the samples after the first `skip`, whose bytes are passed over, and what is wrong with single ones."""
    sample: RawSample = {}
    duplicate, padding, first = "", 0, True

    def finished() -> Iterator[RawSample | Damage]:
        nonlocal skip
        if duplicate:
            yield Damage(url, DUPLICATE, duplicate)
        elif len(sample) > 2 and skip > 0:
            skip -= 1
        elif len(sample) > 2:
            yield sample

    while (header := _header(stream, padding, first)) is not None:
        name, size, is_file = header
        first, padding = False, -size % _BLOCK
        parts = split_name(name) if is_file and size <= _LARGEST else None
        if parts is not None and parts[0] != sample.get("__key__"):
            yield from finished()
            sample, duplicate = {"__key__": parts[0], "__url__": url}, ""
        if parts is None or skip > 0:
            data = b""
            if not stream.skip(size):
                raise _Broken(TRUNCATED)
        else:
            data = stream.read(size)
            if len(data) < size:
                raise _Broken(TRUNCATED)
        if parts is not None and parts[1] in sample:
            duplicate = name
        elif parts is not None:
            sample[parts[1]] = data
    yield from finished()


def read_samples(url: str, skip: int = 0, watch: ReadWatch | None = None) -> Iterator[RawSample | Damage]:
    """Yield the samples of one shard in their order, and a `Damage` for each thing that is wrong with it.

    A shard that breaks off gives its whole samples before that; the one that is cut is not among them. Members that are
    no files, hidden files and webdataset's `__meta__` names are passed over.

    Args:
        url: a path, `pipe:COMMAND`, or a URL that webdataset opens.
        skip: samples to pass over; in a local file their bytes are not read. Damage among them is still reported.
        watch: is told about every read, for `read_ahead`.
    """
    stream = None
    try:
        stream = _Stream(url, watch or ReadWatch())
        try:
            yield from _groups(stream, url, skip)
        except (_Broken, OSError, EOFError, *_CORRUPT):
            stream.finish()  # a command that failed is the reason for what it left out
            raise
        stream.finish()
    except _Broken as broken:
        yield Damage(url, broken.reason, broken.detail)
    except (FileNotFoundError, NotADirectoryError) as error:
        yield Damage(url, MISSING, str(error))
    except EOFError as error:
        yield Damage(url, TRUNCATED, str(error))
    except (OSError, ValueError, *_CORRUPT) as error:
        yield Damage(url, UNREADABLE, str(error))
    finally:
        if stream is not None:
            stream.close()
