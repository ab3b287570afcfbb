"""results.json and results.md of an evaluation, written after each task.

    {"model": {...}, "tasks": {name: {"metric": ..., "value": ..., "n": ..., "seconds": ..., ...}}, "mean": ...}

Values are fractions in [0, 1] in the json and percentages in the tables. `mean` is over the classification tasks.
`per_sample/<task>.npz` beside them holds the outcome of each image (see `llip.clipeval.outcomes`).
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evals.tables import format_results, notes
from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.inputs import changed_parts
from llip.clipeval.metrics import RETRIEVAL
from llip.clipeval.outcomes import outcomes_file, save_outcomes
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.errors import UserError
from llip.system.files import write_text
from llip.system.locks import held_lock
from llip.system.paths import expand_path

LOCK_PATIENCE = 3.0
"""Seconds to wait for an output folder: the data workers of a killed evaluation hold its lock until they notice."""


@dataclass(frozen=True)
class CheckpointIdentity:
    """The weights, and the files beside them that describe the model: the same content is the same, wherever it lies.

    Attributes:
        path: of the weights. bytes: their size.
        sha256: of the weights, or, with files beside them, of the names and hashes of all.
    """

    path: str = field(compare=False)
    bytes: int
    sha256: str

    @classmethod
    def of(cls, weights: Path, beside: Sequence[Path] = ()) -> "CheckpointIdentity":
        """Read all files whole: a copy of other weights may keep size and time (`cp -p`, `rsync -t`)."""
        sha256 = _hash_file(weights)
        if beside:
            parts = [sha256, *([os.path.relpath(path, weights.parent), _hash_file(path)] for path in beside)]
            sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return cls(str(weights.resolve()), weights.stat().st_size, sha256)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ModelIdentity:
    """What must be the same for results to belong together.

    Attributes:
        config: the run config, or the OpenCLIP model with its tag; None for a model that its files describe.
        ema: the moving average of the weights.
    """

    config: str | None
    checkpoint: CheckpointIdentity
    prompt_ensemble: str
    precision: str
    ema: bool = False

    @property
    def title(self) -> str:
        """What tables and charts call the model."""
        return (self.config or self.checkpoint.path) + (" (averaged weights)" if self.ema else "")

    def describes(self, stored: Any) -> bool:
        """Return whether stored results are of this model; those without a hash of the weights are not."""
        try:
            return self == ModelIdentity(**{**stored, "checkpoint": CheckpointIdentity(**stored["checkpoint"])})
        except (KeyError, TypeError):
            return False


@dataclass(frozen=True)
class StoredResults:
    """A results.json: `name` is how the user gave it, `model` what the results are of."""

    name: str
    path: Path
    model: Any
    tasks: dict[str, TaskResult]


def read_results(given: str | Path, fix: str = "expected a results.json of llip eval") -> StoredResults:
    """Read a results.json, or the one in a folder; `fix` ends the message about another file.

    Raises:
        UserError: no such file, or not a results file.
    """
    path = expand_path(str(given))
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"results {given} are not there; expected a results.json of llip eval, or its folder")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tasks = {name: TaskResult.from_json(name, task) for name, task in stored["tasks"].items()}
        return StoredResults(str(given), path, stored["model"], tasks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a results file ({type(error).__name__}: {error}); {fix}") from error


@contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Create an output folder and hold its lock; the operating system releases it when the process dies.

    Raises:
        UserError: the folder cannot be written, another evaluation holds it, or its file system has no locks.
    """
    what, fix = f"output_dir {folder}", "set another output_dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror}; {fix}") from error
    with held_lock(folder / ".lock", what, fix, LOCK_PATIENCE):
        yield


class ResultsFile:
    """The results of one model in one folder; earlier results of another model are moved aside, not lost.

    Attributes:
        moved_to: where results of another model will be when the first task is added, or None.
    """

    def __init__(self, folder: Path, model: ModelIdentity) -> None:
        """Open `folder` (see `locked_output`) and take over the results of the same `model`.

        Raises:
            UserError: a damaged results.json.
        """
        self.folder, self.model = folder, model
        self.moved_to: Path | None = None
        self._results: dict[str, TaskResult] = {}
        self._inputs: dict[str, Mapping[str, str]] = {}
        path = folder / "results.json"
        if not path.is_file():
            return
        stored = read_results(path, "move it away")
        if model.describes(stored.model):
            self._results = stored.tasks
        else:
            names = itertools.chain(["previous"], (f"previous-{number}" for number in itertools.count(2)))
            paths = (path.with_name(f"results.{name}.json") for name in names)
            self.moved_to = next(path for path in paths if not path.exists())

    def changes(self, entry: Entry, shortlist: int | None, inputs: Mapping[str, str]) -> list[str] | None:
        """Return why a task with a result must be evaluated again: [] if it is done, None without a result.

        Args:
            shortlist: that of the evaluation, which only retrieval depends on.
            inputs: what the task is evaluated on now; stored with its result.
        """
        self._inputs[entry.name] = inputs
        result = self._results.get(entry.name)
        if result is None or result.error is not None:
            return None
        wanted = shortlist if entry.kind == RETRIEVAL else None
        other = [f"shortlist changed ({result.shortlist} -> {wanted})"] if result.shortlist != wanted else []
        return other + changed_parts(result.inputs, inputs)

    def tasks(self, names: Iterable[str]) -> list[TaskResult]:
        """Return the results of those of the named tasks that have one, in that order."""
        return [self._results[name] for name in names if name in self._results]

    def add(self, result: TaskResult) -> None:
        """Add one task's result and write the files, each in one atomic step.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            self._add(result)
        except OSError as error:
            raise UserError(f"results cannot be written: {error}; set another output_dir, or make room") from error

    def _add(self, result: TaskResult) -> None:
        if self.moved_to is not None and not self._results:  # not before there is a result that replaces them
            self._move_aside(self.folder / "results.json", self.moved_to)
        self._results[result.task] = replace(result, inputs=self._inputs.get(result.task))
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
    def _move_aside(current: Path, previous: Path) -> None:
        current.replace(previous)
        samples, old = (outcomes_file(path, "any").parent for path in (current, previous))
        shutil.rmtree(old, ignore_errors=True)
        if samples.is_dir():
            samples.replace(old)

    def _markdown(self, results: Sequence[TaskResult]) -> str:
        model = self.model
        failures = [f"{result.task} failed: {result.error}" for result in results if result.error]
        sections = [
            "# Zero-shot evaluation",
            f"Zero-shot results of {model.title}, weights `{model.checkpoint.path}`, in percent; prompts averaged by "
            f"{model.prompt_ensemble}, {model.precision}.",
            format_results(results, markdown=True),
            "\n".join(f"- {line}" for line in [*failures, *notes(results)]),
        ]
        return "\n\n".join(filter(None, sections)) + "\n"
