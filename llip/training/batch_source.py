"""The batches of one training process: a wait for data ends on a stop request, and each failure is one message."""

import multiprocessing.connection
import signal
import threading
import time
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from llip.data.loader import BATCH_DEADLINE, Batch, CaptionedImages, MicroBatch
from llip.errors import RunError, UserError
from llip.training.distributed.signals import StopRequest
from llip.training.distributed.watchdog import name_of_exit

_SLICE = 0.5  # seconds of a wait after which stop requests and dead workers are looked for
_SHORTAGES = ("allocate memory", "can't start new thread", "Too many open files", "No space left on device")


class _WaitEnded(Exception):
    """A stop was requested during the wait."""


class StepData(NamedTuple):
    """What a process has for one step."""

    micro_batches: list[MicroBatch]  # on the device
    batches: list[Batch]  # that they are of; none where data are missing
    missing: bool = False  # the micro-batches are blank, to take part in a step that other processes may have begun
    failure: UserError | None = None  # why they are missing; None: a stop was requested


class BatchSource:
    """Takes the batches of one step after another from a loader."""

    def __init__(self, loader: DataLoader, count: int, device: torch.device, stop: StopRequest) -> None:
        """Start the loader's workers.

        Args:
            loader: yields this process's batches, endlessly.
            count: micro-batches per step.
            device: to move them to.
            stop: ends a wait for data.
        """
        assert isinstance(loader.dataset, CaptionedImages)
        self.dataset, self.count, self.device, self.stop = loader.dataset, count, device, stop
        self.dataset.on_wait = self._end_on_stop
        if loader.num_workers:
            loader.timeout = _SLICE
        others = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        if threading.current_thread() is threading.main_thread():
            # torch would raise a worker's death in the middle of whatever the training process does
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def take(self) -> StepData:
        """Return the batches of the next step; blank ones where a stop was requested before, or where data failed."""
        data, failure = StepData([], []), None
        try:
            for _ in range(self.count):
                batch = self._next()
                data.micro_batches.append(batch.to(self.device))
                data.batches.append(batch._replace(images=data.micro_batches[-1].images))  # frees the host's memory
            return data
        except _WaitEnded:
            pass
        except UserError as error:
            failure = error
        return StepData([self.dataset.blank().to(self.device)] * self.count, [], True, failure)

    def __enter__(self) -> "BatchSource":
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers at once: the loader would wait seconds for each one that is reading."""
        for worker in self._workers:
            worker.terminate()
        del self._batches

    def _next(self) -> Batch:
        deadline = time.monotonic() + BATCH_DEADLINE
        while True:
            self._end_on_stop()
            try:
                batch = next(self._batches)
            except (RuntimeError, MemoryError, OSError, EOFError) as error:
                if "DataLoader timed out" in str(error):
                    if time.monotonic() < deadline:
                        continue
                    raise UserError(f"data: no batch in {BATCH_DEADLINE:.0f} s; check the storage") from None
                raise self._explain(error) from error
            if batch.error:
                raise UserError(batch.error)
            return batch

    def _end_on_stop(self) -> None:
        if self.stop:
            raise _WaitEnded

    def _explain(self, error: Exception) -> Exception:
        """Return a worker's death and a lack of memory, threads or files as one message; other errors as they are."""
        text = str(error).strip()
        # a batch comes with its worker's help
        lost = bool(self._workers) and isinstance(error, ConnectionError | EOFError | FileNotFoundError)
        if lost:
            multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=2)
        ends = {name_of_exit(worker.exitcode) for worker in self._workers if worker.exitcode}
        if failure := self.dataset.failure.read():
            cause = failure
        elif ends or lost or "exited unexpectedly" in text:
            cause = f"a worker died: {', '.join(sorted(ends)) or text or type(error).__name__}"
        elif isinstance(error, MemoryError) or any(words in text for words in _SHORTAGES):
            cause = f"a worker ran out of memory, threads or files: {(text or 'MemoryError').splitlines()[-1]}"
        else:
            return error
        return RunError(f"data: {cause}. Try fewer workers, a smaller batch_size or a smaller shuffle_buffer")
