"""Read ahead in a thread, with a deadline: a shard that stalls is always named."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, NamedTuple, TypeVar

from llip.errors import UserError

READ_DEADLINE = 120.0
"""Seconds without a byte after which a shard counts as stalled."""
EXIT_WAIT = 10.0
"""Seconds that a command gets to exit, and a reader to notice that it was interrupted."""
_CHUNK = 32  # items handed over at once
_CHUNK_SECONDS = 0.2  # after which a smaller chunk is handed over

Item = TypeVar("Item")


class ReadWatch:
    """What a reading thread is doing, for the thread that waits for it: which shard, and since when nothing came."""

    def __init__(self) -> None:
        self.url = ""
        self.moved = time.monotonic()
        self.interrupted = False
        self.on_wait: Callable[[], None] = lambda: None  # called at least once a second by the thread that waits
        self._stop: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def begin(self, url: str, stop: Callable[[], None] | None) -> None:
        """Note that `url` is being read from here on; `stop` interrupts that, None where nothing can."""
        with self._lock:
            self.url, self.moved, self.interrupted, self._stop = url, time.monotonic(), False, stop

    def touch(self) -> None:
        """Note that the reader is making progress."""
        self.moved = time.monotonic()

    def idle(self) -> float:
        """Return the seconds since the reader last made progress."""
        return time.monotonic() - self.moved

    def interrupt(self, deadline: float = 0.0) -> bool:
        """Interrupt what has been silent for `deadline` seconds; False where nothing is or can be."""
        with self._lock:
            if self._stop is None or self.idle() < deadline:
                return False
            self.interrupted = True
            self._stop()
            self._stop = None
            return True


class _Chunk(NamedTuple, Generic[Item]):
    items: list[Item]
    error: BaseException | None = None  # raised after the items
    last: bool = False


def read_ahead(
    items: Iterator[Item], watch: ReadWatch, deadline: float = READ_DEADLINE, first: float | None = None
) -> Generator[Item, None, None]:
    """Yield `items`, which a thread takes a little ahead, and never wait longer than `deadline` for a silent shard.

    The order is that of `items`, and what they raise is raised here. A command or download that is silent for
    `deadline` seconds is interrupted: its shard is reported as stalled, and reading continues. A read from a hung mount
    cannot be interrupted: then the error below names the file, and the thread, which nothing can end, stays behind.

    Args:
        items: reads shards through `read_samples(..., watch=watch)`; only the thread uses it.
        watch: the one given to `read_samples`.
        deadline: seconds.
        first: seconds, as long as no item has come; None: `deadline`.

    Raises:
        UserError: the deadline has passed and the read cannot be interrupted. What `watch.on_wait` raises ends the
            wait, too.
    """
    chunks: queue.Queue[_Chunk[Item]] = queue.Queue(maxsize=2)
    stopped = threading.Event()
    thread = threading.Thread(target=_feed, args=(items, watch, chunks, stopped), name="read-ahead", daemon=True)
    thread.start()
    patience = deadline if first is None else first
    try:
        while True:
            chunk = _next_chunk(chunks, watch, patience)
            patience = deadline
            yield from chunk.items
            if chunk.error is not None:
                raise chunk.error
            if chunk.last:
                return
    finally:
        stopped.set()
        watch.interrupt()


def _next_chunk(chunks: queue.Queue, watch: ReadWatch, deadline: float) -> _Chunk:
    interrupted = None  # when
    while True:
        try:
            return chunks.get(timeout=min(1.0, deadline / 4))
        except queue.Empty:
            watch.on_wait()
            if watch.idle() <= deadline:
                continue
        if interrupted is None and watch.interrupt(deadline):
            interrupted = time.monotonic()
        elif interrupted is None or time.monotonic() - interrupted > EXIT_WAIT:
            raise UserError(
                f"data: nothing could be read from {watch.url!r} for {deadline:.0f} s; check the mount or the command "
                "that delivers it, or remove this shard from train_data"
            )


def _feed(items: Iterator[Item], watch: ReadWatch, chunks: queue.Queue, stopped: threading.Event) -> None:
    """Put `items` into `chunks` until they end, one raises, or `stopped` is set."""
    chunk: list[Item] = []
    started = time.monotonic()
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) >= _CHUNK or time.monotonic() - started > _CHUNK_SECONDS:
                _put(_Chunk(chunk), watch, chunks, stopped)
                chunk, started = [], time.monotonic()
            if stopped.is_set():
                break
        _put(_Chunk(chunk, last=True), watch, chunks, stopped)
    except BaseException as error:  # the consumer raises it, whatever it is
        _put(_Chunk(chunk, error), watch, chunks, stopped)
    finally:
        if hasattr(items, "close"):
            items.close()


def _put(chunk: _Chunk, watch: ReadWatch, chunks: queue.Queue, stopped: threading.Event) -> None:
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            chunks.put(chunk, timeout=0.5)
            break
    watch.touch()  # time spent waiting for the consumer is not the shard's
