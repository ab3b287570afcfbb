"""What all tasks of an evaluation share, and how a task fails: on every process, while the other tasks run."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from llip.clipeval.datasets import ImageSource
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.loading import ImageBatch, image_batches
from llip.clipeval.scorer import Scorer
from llip.clipeval.texts.cache import TextCache
from llip.errors import UserError
from llip.system.processes import Processes, raise_on_all_ranks

logger = logging.getLogger(__name__)


class TaskError(Exception):
    """One task cannot be evaluated. Raised on every process; the message is for the user."""


@dataclass(frozen=True)
class TaskRun:
    """How to evaluate; see `evaluate.evaluate_tasks`."""

    scorer: Scorer
    config: EvalConfig
    processes: Processes = field(default_factory=Processes)
    cache: TextCache | None = None
    progress: bool = False

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise a failure of one process on all of them; the block must not call a collective.

        Raises:
            TaskError: the message is that of the first process that failed.
        """
        with raise_on_all_ranks(self.processes, TaskError, self._describe):
            yield

    def _describe(self, error: Exception) -> str:
        rank, world_size = self.processes.rank, self.processes.world_size
        message = str(error)
        if not isinstance(error, UserError):
            logger.debug("evaluation failed on process %d\n%s", rank, traceback.format_exc())
            message = f"{type(error).__name__}: {error}"
        return message + (f" (process {rank} of {world_size})" if rank else "")  # what fails on the first fails on all

    def title(self, text: str) -> str | None:
        """Return `text` as the title of a progress bar, None if this process shows none."""
        return text if self.progress and self.processes.is_main else None

    def batches(self, source: ImageSource, task: str) -> Iterator[ImageBatch]:
        """Yield this process's share of the images, with a progress bar on the first process."""
        share, title, config = self.processes.share(len(source)), self.title(task), self.config
        with tqdm(total=len(share), desc=title, unit="img", disable=title is None, leave=False) as bar:
            for batch in image_batches(source, self.scorer.preprocess, share, config.batch_size, config.workers):
                yield batch
                bar.update(len(batch.indices) + len(batch.unreadable))

    def encode(self, batch: ImageBatch, source: ImageSource) -> Tensor:
        """Return the mixture tokens [B, K, D] of a batch; errors name the image."""
        return self.scorer.encode_images(batch.images, lambda row: f"image {source.name(batch.indices[row])}")
