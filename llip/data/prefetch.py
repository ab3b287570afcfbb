"""Read ahead in a thread, with a deadline: a shard that stalls is always named."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from llip.errors import UserError

READ_DEADLINE = 120.0
"""Seconds without a byte after which a shard counts as stalled."""
EXIT_WAIT = 10.0
"""Seconds that a command gets to leave, and a reader to notice that its command was ended."""
_AHEAD = 32  # items handed over at once

Item = TypeVar("Item")


class ReadWatch:
    """What a reading thread is at, for the thread that waits for it: which shard, and since when nothing came."""

    def __init__(self) -> None:
        self.url = ""
        self.moved = time.monotonic()
        self.interrupted = False
        self.on_wait: Callable[[], None] = lambda: None  # called in turns of a second at most, by the thread that waits
        self._stop: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def begin(self, url: str, stop: Callable[[], None] | None) -> None:
        """Note that `url` is being read now; `stop` ends the command that delivers it, if there is one."""
        with self._lock:
            self.url, self.moved, self.interrupted, self._stop = url, time.monotonic(), False, stop

    def touch(self) -> None:
        """Note that the reader is moving."""
        self.moved = time.monotonic()

    def idle(self) -> float:
        """Return the seconds since the reader last moved."""
        return time.monotonic() - self.moved

    def interrupt(self, deadline: float = 0.0) -> bool:
        """End the command that has been silent for `deadline` seconds; False where there is none to end."""
        with self._lock:
            if self._stop is None or self.idle() < deadline:
                return False
            self.interrupted = True
            self._stop()
            self._stop = None
            return True


def read_ahead(
    items: Iterator[Item], watch: ReadWatch, deadline: float = READ_DEADLINE, first: float | None = None
) -> Generator[Item, None, None]:
    """Yield `items`, which a thread takes a little ahead, and never wait longer than `deadline` for a silent shard.

    The order is that of `items`, and what they raise is raised here. A command that is silent for `deadline` seconds is
    ended: its shard is reported as stalled, and reading goes on. A file cannot be taken back from a hung mount: then
    the error below names it, and the thread, which nothing can end, is left behind.

    Args:
        items: reads shards through `read_samples(..., watch=watch)`; the thread alone uses it.
        watch: the one given to `read_samples`.
        deadline: seconds.
        first: seconds, as long as no item has come; None: `deadline`.

    Raises:
        UserError: the deadline has passed and the shard cannot be left. What `watch.on_wait` raises ends the wait, too.
    """
    handover: queue.Queue[tuple[list[Item], BaseException | None, bool]] = queue.Queue(maxsize=2)
    stopped = threading.Event()
    thread = threading.Thread(target=_feed, args=(items, watch, handover, stopped), name="read-ahead", daemon=True)
    thread.start()
    patience = deadline if first is None else first
    try:
        while True:
            chunk, error, more = _next_chunk(handover, watch, patience)
            patience = deadline
            yield from chunk
            if error is not None:
                raise error
            if not more:
                return
    finally:
        stopped.set()
        watch.interrupt()


def _next_chunk(handover: queue.Queue, watch: ReadWatch, deadline: float) -> tuple[list, BaseException | None, bool]:
    ended = None  # when the command was
    while True:
        try:
            return handover.get(timeout=min(1.0, deadline / 4))
        except queue.Empty:
            watch.on_wait()
            if watch.idle() <= deadline:
                continue
        if ended is None and watch.interrupt(deadline):
            ended = time.monotonic()
        elif ended is None or time.monotonic() - ended > EXIT_WAIT:
            raise UserError(
                f"data: nothing could be read from {watch.url!r} for {deadline:.0f} s; check the mount or the command "
                "that delivers it, or leave this shard out of train_data"
            )


def _feed(items: Iterator[Item], watch: ReadWatch, handover: queue.Queue, stopped: threading.Event) -> None:
    def put(chunk: list, error: BaseException | None = None, more: bool = True) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                handover.put((chunk, error, more), timeout=0.5)
                break
        watch.touch()  # time spent waiting for the consumer is not the shard's

    chunk: list = []
    started = time.monotonic()
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) >= _AHEAD or time.monotonic() - started > 0.2:
                put(chunk)
                chunk, started = [], time.monotonic()
            if stopped.is_set():
                break
        put(chunk, None, False)
    except BaseException as error:  # whatever it is belongs to the consumer
        put(chunk, error, False)
    finally:
        if hasattr(items, "close"):
            items.close()
