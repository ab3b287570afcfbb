"""What a run says: the terminal, log.txt, metrics.jsonl, evals.jsonl and reporters. The main process alone speaks."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llip.configs import Config
from llip.training.data import Batch
from llip.training.data_report import DataReport
from llip.training.reporters import Reporter, open_reporters
from llip.training.run_folder import EVALS, METRICS, cut_back
from llip.training.sample_log import SampleLog

log = logging.getLogger("llip")


class _TqdmHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(folder: Path | None) -> None:
    """Send the project's log to the terminal and to `<folder>/log.txt`; only warnings where `folder` is None."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if folder else logging.WARNING)
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class RunLog:
    """Writes a run's records. On processes other than the main one it writes nothing but ids of samples."""

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
        """
        self.folder, self.data, self.samples = folder, data, samples
        self.reporters: list[Reporter] = []
        if folder is None:
            return
        for name in (METRICS, EVALS):
            cut_back(folder / name, step)
        self.reporters = open_reporters(config, folder, step)

    def batch(self, batch: Batch, number: int, step: int) -> None:
        """Note what came with this process's batch number `number`, which `step` uses."""
        self.data.add(batch.report, number)
        if self.samples is not None:
            self.samples.add(step, batch.ids)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        assert self.folder is not None
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self, record: dict[str, Any]) -> None:
        """Record one logged step: `step` and numbers; null is what is not finite, which JSON has no word for."""
        if self.folder is None:
            return
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._append(METRICS, record)
        self._scalars("train", record)

    def evaluation(self, step: int, task: str, values: dict[str, float]) -> None:
        """Record one online evaluation: one line per step and task."""
        if self.folder is None:
            return
        self._append(EVALS, {"step": step, "task": task, "values": values})
        self._scalars(f"eval/{task}", {"step": step, **values})

    def has_evaluation(self, step: int) -> bool:
        """Tell whether a model of `step` has been evaluated already."""
        if self.folder is None or not (self.folder / EVALS).is_file():
            return False
        return any(json.loads(line)["step"] == step for line in (self.folder / EVALS).read_text().splitlines())

    def _scalars(self, prefix: str, record: dict[str, Any]) -> None:
        values = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for reporter in self.reporters:
            reporter.scalars(record["step"], values)

    def close(self) -> None:
        """Flush what is buffered."""
        for reporter in self.reporters:
            reporter.close()
