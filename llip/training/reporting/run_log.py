"""What a run says: the terminal, log.txt, metrics.jsonl, evals.jsonl and reporters. The main process alone speaks."""

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
    """Standard error for progress bars. One that is gone, or a file on a full disk, ends no run."""

    def write(self, text: str) -> None:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Tell whether somebody is looking."""
        return sys.stderr.isatty()

    def fileno(self) -> int:
        """Return the file's number, by which tqdm asks for the width of the screen."""
        return sys.stderr.fileno()


class _TqdmHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone, or a file on a full disk: log.txt has it too
            tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """Writes log.txt; a disk that does not take a line is said once, not with a traceback for every line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                tqdm.write(f"{self.baseFilename} cannot be written: {error}. It has gaps from here on", file=sys.stderr)


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
    """Writes a run's records. On processes other than the main one it writes nothing but ids of samples.

    A disk that is full or fails in the middle of a run is a warning: records are lost until it takes them again.
    """

    def __init__(
        self, folder: Path | None, config: Config, step: int, data: DataReport, samples: SampleLog | None = None
    ) -> None:
        """Open the record files of `folder`, cut back to `step`; no folder, no records.

        Args:
            folder: the run's, None on processes other than the main one.
            config: the run.
            step: where it starts.
            data: what this process's workers report.
            samples: takes the ids of this process's samples, where they are wanted.

        Raises:
            UserError: a reporter cannot be opened.
            OSError: a file cannot be cut back; names it.
        """
        self.folder, self.data, self.samples = folder, data, samples
        self.reporters: list[Reporter] = []
        self._gaps: dict[str, BestEffort] = {}
        if folder is None:
            return
        self._gaps = {name: BestEffort(str(folder / name)) for name in (METRICS, EVALS)}
        cut_back(folder / METRICS, step)
        with locked_evaluations(folder):  # jobs of the run before may still write
            cut_back(folder / EVALS, step)
        self.reporters = open_reporters(config, folder, step)

    def batch(self, batch: Batch, number: int, step: int) -> None:
        """Note what came with this process's batch number `number`, which `step` uses."""
        self.data.add(batch.report, number)
        if self.samples is not None:
            self.samples.add(step, batch.ids)

    def metrics(self, record: dict[str, Any]) -> None:
        """Record one logged step: `step` and numbers; null is what is not finite, which JSON has no word for."""
        if self.folder is None:
            return
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with self._gaps[METRICS].allowed():
            append_record(self.folder / METRICS, record)
        self._scalars("train", record)

    def evaluation(self, step: int, task: str, values: dict[str, float]) -> None:
        """Record one online evaluation: one line per step and task."""
        if self.folder is None:
            return
        with self._gaps[EVALS].allowed(), locked_evaluations(self.folder):
            append_record(self.folder / EVALS, {"step": step, "task": task, "values": values})
        self._scalars(f"eval/{task}", {"step": step, **values})

    def evaluated_tasks(self, step: int) -> set[str]:
        """Return the tasks for which results of the model of `step` are recorded; none on other processes."""
        if self.folder is None:
            return set()
        try:
            with locked_evaluations(self.folder):
                records = read_records(self.folder / EVALS)
        except OSError as error:  # evaluating once more is the smaller harm
            log.warning("evaluations that are done already cannot be found: %s", error)
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
        """Flush what is buffered, and say which records are lost."""
        for gaps in self._gaps.values():
            gaps.close()
        if self.samples is not None:
            self.samples.close()
        for reporter in self.reporters:
            reporter.close()
