"""How a data worker that cannot hand over a batch ends, and how the training process learns the cause.

A worker pickles its batches in a thread. By default an error there (no memory to share, no thread to share it by) is
printed and the batch is lost, so that the training process waits for it.
"""

import mmap
import multiprocessing.queues
import os

from llip.errors import EXIT_RUN

_SIZE = 1024  # bytes of the cause


class FailureNote:
    """Memory shared with the data workers, in which one leaves the cause of its end."""

    def __init__(self) -> None:
        """Share the memory with the processes that are forked later."""
        self._memory = mmap.mmap(-1, _SIZE)

    def read(self) -> str:
        """Return the cause that a worker has left; empty if there is none."""
        return self._memory[:].partition(b"\0")[0].decode(errors="replace")

    def write(self, cause: str) -> None:
        """Leave a cause; the end of a long one is cut."""
        text = cause.encode()[: _SIZE - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    def exit_on_lost_batch(self) -> None:
        """In a worker: leave the cause and exit where a batch cannot be handed over."""

        def exit_with_cause(error: Exception, _: object) -> None:
            self.write(f"a worker could not hand over a batch: {type(error).__name__}: {error}")
            os._exit(EXIT_RUN)

        # documented as the hook for errors of the thread that feeds a queue
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_with_cause)  # type: ignore[attr-defined]
