"""results.json and results.md of an evaluation, written after each task.

`per_sample/<task>.npz` beside them says of each image how it came out (see `llip.clipeval.outcomes`).

    {"model": {...}, "tasks": {name: {"metric": ..., "value": ..., "n": ..., "seconds": ..., ...}}, "mean": ...}

Values are fractions in [0, 1] in the json and percentages in the tables. `mean` is over the classification tasks.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.tables import format_results, notes
from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.metrics import RETRIEVAL
from llip.clipeval.outcomes import outcomes_file, save_outcomes
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.errors import UserError
from llip.system.files import write_text
from llip.system.paths import expand_path


@dataclass(frozen=True)
class CheckpointIdentity:
    """Which file the results are of; a file written anew is another one."""

    path: str
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "CheckpointIdentity":
        real = path.resolve()
        status = real.stat()
        return cls(str(real), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class ModelIdentity:
    """What must be the same for results to belong together."""

    config: str
    checkpoint: CheckpointIdentity
    prompt_ensemble: str
    precision: str


@dataclass(frozen=True)
class StoredResults:
    """A results.json as it was found: `name` is what the user calls it."""

    name: str
    path: Path
    tasks: dict[str, TaskResult]


def read_results(given: str | Path) -> StoredResults:
    """Read a results.json, or the one in a folder.

    Raises:
        UserError: no such file, or not a results file.
    """
    path = expand_path(str(given))
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"results {given} are not there; expected a results.json of evals.main_mc, or its folder")
    return StoredResults(str(given), path, _tasks(path, _parse(path)))


def _parse(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"model": stored["model"], "tasks": dict(stored["tasks"])}
    except (ValueError, KeyError, TypeError) as error:
        raise _not_results(path, error) from error


def _tasks(path: Path, stored: dict[str, Any]) -> dict[str, TaskResult]:
    try:
        return {name: TaskResult.from_json(name, task) for name, task in stored["tasks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_results(path, error) from error


def _not_results(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a results file ({type(error).__name__}: {error}); move it away")


class ResultsFile:
    """The results of one model in one folder; earlier results of another model are set aside, not lost."""

    def __init__(self, folder: Path, model: ModelIdentity) -> None:
        """Open `folder` (made when it is not there) and take over the results that are of the same `model`.

        Raises:
            UserError: the folder cannot be written, or holds a damaged results.json.
        """
        self.folder, self.model = folder, model
        self.set_aside: Path | None = None
        self._results: dict[str, TaskResult] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"output_dir {folder} cannot be written by this user")
        self._read(folder / "results.json")

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        stored = _parse(path)
        if stored["model"] == asdict(self.model):
            self._results = _tasks(path, stored)
            return
        self.set_aside = path.with_name("results.previous.json")

    def is_done(self, entry: Entry, shortlist: int | None) -> bool:
        """Tell whether the task was evaluated without error, for the entry as it is written now.

        Args:
            shortlist: that of the evaluation; it concerns retrieval alone.
        """
        result = self._results.get(entry.name)
        wanted = shortlist if entry.kind == RETRIEVAL else None
        return (
            result is not None
            and result.error is None
            and result.fingerprint == entry.fingerprint
            and result.shortlist == wanted
        )

    def tasks(self, names: Iterable[str]) -> list[TaskResult]:
        """Return the results there are of the named tasks, in that order."""
        return [self._results[name] for name in names if name in self._results]

    def add(self, result: TaskResult) -> None:
        """Take in one task's result and write the files, each in one atomic step."""
        if self.set_aside is not None and not self._results:  # not before there is something to put in its place
            self._set_aside(self.folder / "results.json", self.set_aside)
        self._results[result.task] = result
        if result.outcomes is not None:  # first: a result without its outcomes would stay so for good
            save_outcomes(outcomes_file(self.folder / "results.json", result.task), result.outcomes)
        results = list(self._results.values())
        stored: dict[str, Any] = {
            "model": asdict(self.model),
            "tasks": {result.task: result.to_json() for result in results},
            "mean": classification_mean(results),
        }
        write_text(self.folder / "results.json", json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
        write_text(self.folder / "results.md", self._markdown(results))

    @staticmethod
    def _set_aside(current: Path, previous: Path) -> None:
        current.replace(previous)
        samples, old = (outcomes_file(path, "any").parent for path in (current, previous))
        shutil.rmtree(old, ignore_errors=True)
        if samples.is_dir():
            samples.replace(old)

    def _markdown(self, results: list[TaskResult]) -> str:
        checkpoint = self.model.checkpoint
        about = (
            f"Zero-shot results of `{checkpoint.path}` ({self.model.config}), in percent; prompts averaged by "
            f"{self.model.prompt_ensemble}, {self.model.precision}."
        )
        lines = [*(f"{one.task} failed: {one.error}" for one in results if one.error), *notes(results)]
        told = "".join(f"\n- {line}" for line in lines)
        return f"# Zero-shot evaluation\n\n{about}\n\n{format_results(results, markdown=True)}\n" + (
            told and told + "\n"
        )
