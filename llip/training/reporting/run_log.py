"""Output of a run: the terminal, log.txt, metrics.jsonl, evals.jsonl and reporters. Only the main process writes."""

import contextlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llip.configs import Config
from llip.data.loader import Batch
from llip.training.checkpoints.records import (
    EVALS,
    METRICS,
    BestEffort,
    append_record,
    cut_back,
    locked_evaluations,
    read_records,
)
from llip.training.reporting.data_report import DataReport
from llip.training.reporting.reporters import Reporter, open_reporters
from llip.training.reporting.sample_log import SampleLog

log = logging.getLogger("llip")


class Terminal:
    """Standard error for progress bars, where a closed terminal or a full disk is no error."""

    def write(self, text: str) -> None:
        """Write text, if possible."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return sys.stderr.isatty()

    def fileno(self) -> int:
        """Return the file descriptor, from which tqdm finds the width of the screen."""
        return sys.stderr.fileno()


class _TqdmHandler(logging.Handler):
    """Prints log lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a closed terminal or a full disk; log.txt has it too
            tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """Writes log.txt; reports a failing disk once, without a traceback."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            with contextlib.suppress(OSError):
                tqdm.write(
                    f"{self.baseFilename} cannot be written: {error}. Lines are missing from here on", file=sys.stderr
                )


def start_logging(folder: Path | None) -> None:
    """Send the project's log to the terminal and to `<folder>/log.txt`; only warnings where `folder` is None.

    Raises:
        OSError: log.txt cannot be opened.
    """
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if folder else logging.WARNING)
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if folder is not None:
        handlers.append(_FileHandler(folder / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class RunLog:
    """Writes a run's records; on processes other than the main one only the ids of samples.

    A disk that is full or fails during a run is a warning: records are lost until it works again.
    """

    def __init__(
        self, folder: Path | None, config: Config, step: int, data: DataReport, samples: SampleLog | None = None
    ) -> None:
        """Open the record files of `folder`, cut back to `step`.

        Args:
            folder: the run's folder; None, without records, on processes other than the main one.
            config: the run's config.
            step: that the run continues from.
            data: collects the reports of this process's workers.
            samples: writes the ids of this process's samples.

        Raises:
            UserError: a reporter cannot be opened.
            OSError: a file cannot be cut back; names it.
        """
        self.folder, self.data, self.samples = folder, data, samples
        self.reporters: list[Reporter] = []
        self._guards: dict[str, BestEffort] = {}
        if folder is None:
            return
        self._guards = {name: BestEffort(str(folder / name)) for name in (METRICS, EVALS)}
        cut_back(folder / METRICS, step)
        with locked_evaluations(folder):  # evaluation jobs of an earlier start may still write
            cut_back(folder / EVALS, step)
        self.reporters = open_reporters(config, folder, step)

    def batch(self, batch: Batch, number: int, step: int) -> None:
        """Record the report and ids of this process's batch `number`, which `step` uses."""
        self.data.add(batch.report, number)
        if self.samples is not None:
            self.samples.add(step, batch.ids)

    def metrics(self, record: dict[str, Any]) -> None:
        """Record a step: `step` and numbers, null for those that are not finite."""
        if self.folder is None:
            return
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with self._guards[METRICS].allowed():
            append_record(self.folder / METRICS, record)
        self._scalars("train", record)

    def evaluation(self, step: int, task: str, values: dict[str, float]) -> None:
        """Record an online evaluation of a task."""
        if self.folder is None:
            return
        with self._guards[EVALS].allowed(), locked_evaluations(self.folder):
            append_record(self.folder / EVALS, {"step": step, "task": task, "values": values})
        self._scalars(f"eval/{task}", {"step": step, **values})

    def evaluated_tasks(self, step: int) -> set[str]:
        """Return the tasks with recorded results of the model after `step`; none on other processes."""
        if self.folder is None:
            return set()
        try:
            with locked_evaluations(self.folder):
                records = read_records(self.folder / EVALS)
        except OSError as error:  # then evaluate again
            log.warning("finished evaluations cannot be read: %s; they run again", error)
            return set()
        return {record["task"] for record in records if record["step"] == step and "task" in record}

    def _scalars(self, prefix: str, record: dict[str, Any]) -> None:
        values = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for reporter in self.reporters:
            reporter.scalars(record["step"], values)

    def close(self) -> None:
        """Flush what is buffered, and warn about lost records."""
        for guard in self._guards.values():
            guard.close()
        if self.samples is not None:
            self.samples.close()
        for reporter in self.reporters:
            reporter.close()
