"""The bytes of one shard, forward only and decompressed: of a file, of a command's output, or over HTTP."""

import base64
import bz2
import contextlib
import gzip
import http.client
import io
import lzma
import os
import random
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from typing import Any

from llip.data.prefetch import EXIT_WAIT, ReadWatch
from llip.data.sources import is_local

MISSING = "shard is not there"
UNREADABLE = "shard cannot be read"
ZERO_BYTES = "shard has zero bytes"
NOT_A_TAR = "shard is not a tar"
TRUNCATED = "truncated tar"
ZSTD = "shard is compressed with zstd"
COMMAND_FAILED = "shard command failed"
DOWNLOAD_FAILED = "shard download failed"
STALLED = "shard stalled"
BAD_HEADER = "damaged tar header"

CORRUPT = (zlib.error, lzma.LZMAError)
"""What the decompressors raise beside `OSError` and `EOFError`."""

LARGEST = 1 << 28
"""Bytes of a member; what claims more is no picture."""

_PIECE = 1 << 20  # bytes of one read: a slow stream is seen to move, and a wrong size cannot ask for all memory
_BUFFER = 1 << 17
_DRAIN = 1 << 20  # bytes read after the end of the tar to learn how the command ends
_DECOMPRESS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMMANDS = {"gs": "gsutil cat {}", "hdfs": "hdfs dfs -cat {}", "ais": "ais get {} -"}  # scheme -> what prints a URL

_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))  # HTTP statuses that a later request may not get
_ATTEMPTS = 6  # in a row without a byte
_BACKOFF = 0.5  # seconds before the second attempt; doubles
_SILENCE = 9.0  # seconds without a byte that end an attempt; below EXIT_WAIT, so that `stop` acts in time
_PATIENCE = 30.0  # seconds without a byte after which no attempt begins


class ShardError(Exception):
    """Ends the reading of one shard. `reason` is a fixed phrase."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Command:
    """A shell command whose output is a shard."""

    def __init__(self, command: str) -> None:
        """Start the command, in a process group: a shell's children are only reached as a group."""
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,  # a command that waits for the terminal would stall
            stdout=subprocess.PIPE,
            stderr=self.messages,
            bufsize=0,
            process_group=0,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def check(self) -> None:
        """Wait for the command's end.

        Raises:
            ShardError: the command failed, or has not ended in time.
        """
        try:
            code = self.process.wait(EXIT_WAIT)
        except subprocess.TimeoutExpired:
            raise ShardError(COMMAND_FAILED, f"not ended {EXIT_WAIT:.0f} s after its output") from None
        if code != 0:
            raise ShardError(COMMAND_FAILED, f"exit code {code}{self._last_message()}")

    def _last_message(self) -> str:
        self.messages.seek(max(0, self.messages.seek(0, io.SEEK_END) - 4096))
        lines = self.messages.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((f": {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "")

    def kill(self) -> None:
        """End the command at once, with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the command if it still runs."""
        if self.process.poll() is None:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_WAIT)
        self.output.close()
        self.messages.close()


class Download(io.RawIOBase):
    """The body of an http(s) or hf:// URL.

    After a cut, a reset or a status that may pass, the rest is requested again: by a range, or, where the server
    ignores it, from the start, dropping the bytes that were delivered. So nothing is repeated or skipped.
    """

    def __init__(self, url: str, watch: ReadWatch) -> None:
        """Prepare to read; the first read connects. `watch` is notified of each piece of the body."""
        self.url, self.watch = url, watch
        self.received = 0  # bytes
        self.version: tuple[int | None, str | None] | None = None  # the shard's size and ETag, at the first response
        self.response: http.client.HTTPResponse | None = None
        self.stopped = threading.Event()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` and return the number of bytes, 0 at the end.

        Raises:
            ShardError: the server refuses the URL, or no byte came in several attempts.
        """
        began = time.monotonic()
        for attempt in range(_ATTEMPTS):
            try:
                return self._receive(buffer)
            except urllib.error.HTTPError as error:
                cause = f"HTTP status {error.code} {error.reason}"
                if error.code not in _TRANSIENT:
                    raise ShardError(MISSING if error.code in (404, 410) else UNREADABLE, cause) from error
            except (OSError, http.client.HTTPException) as error:
                cause = str(getattr(error, "reason", error))[:200] or type(error).__name__
            self._disconnect()
            delay = _BACKOFF * 2**attempt * random.SystemRandom().uniform(0.5, 1.5)  # not from the run's random state
            late = time.monotonic() + delay - began > _PATIENCE
            if attempt + 1 == _ATTEMPTS or late or self.stopped.wait(delay):
                break
        if self.stopped.is_set():
            raise ShardError(STALLED, cause)
        seconds = time.monotonic() - began
        raise ShardError(DOWNLOAD_FAILED, f"{cause} ({attempt + 1} attempts in {seconds:.0f} s)")

    def _receive(self, buffer: Any) -> int:
        response = self.response or self._connect()
        count = response.readinto(buffer)
        size = self.version[0] if self.version else None
        if count == 0 and size is not None and self.received < size:
            raise ConnectionError(f"connection closed after {self.received:,} of {size:,} bytes")
        self.received += count
        self.watch.touch()
        return count

    def _connect(self) -> http.client.HTTPResponse:
        """Request what has not been received."""
        request = _request(self.url)
        if self.received:
            request.add_header("Range", f"bytes={self.received}-")
        response = self.response = urllib.request.urlopen(request, timeout=_SILENCE)
        skipped = 0 if response.status == http.HTTPStatus.PARTIAL_CONTENT else self.received
        length = response.headers["Content-Length"]
        version = None if length is None else self.received - skipped + int(length), response.headers["ETag"]
        if self.version is None:
            self.version = version
        elif version != self.version:
            raise ShardError(UNREADABLE, "changed while it was read")
        while skipped > 0:
            if not (data := response.read(min(skipped, _PIECE))):
                raise ConnectionError("connection closed early")
            skipped -= len(data)
            self.watch.touch()
        return response

    def _disconnect(self) -> None:
        if self.response is not None:
            self.response.close()
        self.response = None

    def stop(self) -> None:
        """End the reading, from another thread: at the next attempt."""
        self.stopped.set()

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()


def _request(url: str) -> urllib.request.Request:
    """Return the request of a URL. Credentials stay with its host: a redirect does not carry them elsewhere."""
    authorization = None
    if url.startswith("hf:"):
        from huggingface_hub import HfFileSystem, get_token, hf_hub_url  # seconds to import

        try:
            path: Any = HfFileSystem().resolve_path(url)
        except Exception as error:  # its HTTP client raises what no other does
            raise ConnectionError(str(error)) from error
        url = hf_hub_url(path.repo_id, path.path_in_repo, repo_type=path.repo_type, revision=path.revision)
        token = get_token()
        authorization = f"Bearer {token}" if token else None
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        authorization = "Basic " + base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    url = urllib.parse.quote(parts._replace(netloc=host).geturl(), safe="!#$%&'()*+,/:;=?@[]~")
    request = urllib.request.Request(url, headers={"User-Agent": "llip"})
    if authorization:
        request.add_unredirected_header("Authorization", authorization)
    return request


class ShardFile:
    """The decompressed bytes of one shard, forward only."""

    def __init__(self, url: str, watch: ReadWatch) -> None:
        """Open a path, `pipe:COMMAND`, or a URL; `watch` is notified of every read.

        Raises:
            OSError, ShardError: it cannot be opened.
        """
        self.watch, self.position = watch, 0  # bytes read or skipped
        self.command: Command | None = None
        self.size: int | None = None  # bytes of the shard, where they can be skipped unread
        watch.begin(url, None)
        scheme, _, rest = url.partition(":")
        raw: Any
        if is_local(url) or scheme == "file":
            raw = io.FileIO(url if is_local(url) else urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
            self.size = os.fstat(raw.fileno()).st_size
        elif scheme in ("http", "https", "hf"):
            raw = Download(url, watch)
            watch.begin(url, raw.stop)
        elif scheme == "pipe" or scheme in _COMMANDS:
            self.command = Command(rest if scheme == "pipe" else _COMMANDS[scheme].format(shlex.quote(url)))
            raw = self.command.output
            watch.begin(url, self.command.kill)
        else:
            raise ShardError(UNREADABLE, f"{scheme}: URLs are not supported")
        self.raw = raw
        self.file: Any = io.BufferedReader(raw, _BUFFER)  # the decompressors' classes have no common type
        try:
            self._decompress(url)
        except BaseException:
            self.close()
            raise
        watch.touch()

    def _decompress(self, url: str) -> None:
        start = self.file.peek(8)
        if start.startswith(_ZSTD_MAGIC):
            raise ShardError(ZSTD, f"use 'pipe:zstd -dc {url}'")
        for magic, opener in _DECOMPRESS:
            if start.startswith(magic):
                self.file, self.size = opener(self.file), None
                return

    def tell(self) -> int:
        """Return the number of bytes read or skipped."""
        return self.position

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            ShardError: there are fewer, or `count` is unreasonable.
        """
        if count > LARGEST:
            raise ShardError(BAD_HEADER)
        pieces = []
        while count > 0 and (piece := self.file.read(min(count, _PIECE))):
            self.watch.touch()
            self.position += len(piece)
            count -= len(piece)
            pieces.append(piece)
        if count > 0:
            raise ShardError(TRUNCATED if self.position >= 512 else NOT_A_TAR if self.position else ZERO_BYTES)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        """Skip the next `count` bytes, in a local file without reading them.

        Raises:
            ShardError: there are fewer.
        """
        if self.size is not None and self.position + count <= self.size:
            self.file.seek(count, io.SEEK_CUR)
            self.position += count
            self.watch.touch()
            return
        while count > 0:
            count -= len(self.read(min(count, _PIECE)))

    def finish(self) -> None:
        """Check how a command ends.

        Raises:
            ShardError: it failed, or has not ended in time.
        """
        if self.command is None:
            return
        with contextlib.suppress(ShardError, OSError, EOFError, *CORRUPT):
            self.skip(_DRAIN)
            return  # more than a tar's padding: data after the archive end are ignored, the command is ended
        if self.watch.interrupted:
            raise ShardError(STALLED)
        self.command.check()

    def close(self) -> None:
        """Close the shard; a command that still runs is ended."""
        self.watch.begin(self.watch.url, None)
        if self.command is not None:
            self.command.close()
        self.file.close()
        self.raw.close()  # a decompressor leaves it open
