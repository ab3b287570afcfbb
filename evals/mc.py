"""The program `mc`: evaluate one model zero-shot on the tasks of a catalog, task by task, on every device."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evals.chart import bar_chart
from evals.devices import ProcessKilledError, launch
from evals.models import find_weights_file, identify_model, load_model, model_precision
from evals.results import ResultsFile, StoredResults, locked_output, read_results
from evals.tables import format_results, notes
from llip.clipeval.catalog.catalog import Entry, load_catalog
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.inputs import task_inputs
from llip.clipeval.task_result import TaskResult
from llip.errors import CollectiveUserError, UserError
from llip.open_clip.model import Llip, autocast_dtype
from llip.system.processes import Processes, raise_on_all_ranks

WAYS = ("image_to_text", "text_to_image")

LoadModel = Callable[[EvalConfig], Llip]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate: the same on every process, and picklable.

    Attributes:
        config: with model and output folder.
        weights: the model's file. stamp: its size and time when the evaluation began.
        entries: all tasks. tasks: names of those that are not done.
        results: of the tasks that are done. earlier: results of other evaluations, for the chart.
        load: returns the model, carrying `.preprocess_val` and `.tokenizer`; importable.
    """

    config: EvalConfig
    weights: Path
    stamp: tuple[int, int]
    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    results: ResultsFile
    earlier: tuple[StoredResults, ...]
    load: LoadModel


def run(config: EvalConfig, devices: Sequence[str], load: LoadModel = load_model) -> int:
    """Evaluate and print a table; return 0, or 1 when some task could not be evaluated.

    In a process group, as in a SLURM job, every process calls it; the main one reads and writes the files.

    Args:
        config: with model and output folder. devices: one process each.
        load: returns the model, carrying `.preprocess_val` and `.tokenizer`; importable.

    Raises:
        UserError: unknown model, run config, catalog or task, missing weights or earlier results, an output folder
            that is unwritable or in use.
    """
    processes = Processes.of_group()
    with contextlib.ExitStack() as held:
        with raise_on_all_ranks(processes, CollectiveUserError, _user_message):
            evaluation = held.enter_context(_open_evaluation(config, devices, load)) if processes.is_main else None
        evaluation = processes.broadcast_object(evaluation)
        if evaluation.tasks:
            _evaluate_all(evaluation, devices)
        return _report(evaluation) if processes.is_main else 0


def _user_message(error: Exception) -> str | None:
    return str(error) if isinstance(error, UserError) else None


@contextlib.contextmanager
def _open_evaluation(config: EvalConfig, devices: Sequence[str], load: LoadModel) -> Iterator[Evaluation]:
    """Check the request and yield what remains to be evaluated, with the output folder locked."""
    precision = model_precision(config, devices[0])
    weights = find_weights_file(config)
    stamp = _stamp(weights)  # before the content is read
    entries = load_catalog(config.catalog_name).select(config.tasks)
    model = identify_model(config, weights, precision)
    earlier = tuple(read_results(path) for path in config.compare_with)
    folder = config.output_folder
    with locked_output(folder):
        results = ResultsFile(folder, model)
        if results.moved_to is not None:
            print(f"earlier results are of another model or protocol; they will be kept in {results.moved_to}")
        changes = {entry.name: results.changes(entry, config.shortlist, task_inputs(entry)) for entry in entries}
        for name, reasons in changes.items():
            if reasons:
                print(f"{name} is evaluated again: {', '.join(reasons)}")
        tasks = tuple(name for name, reasons in changes.items() if reasons is None or reasons)
        if kept := len(entries) - len(tasks):
            print(f"{kept} of {len(entries)} tasks are done already: {results.folder / 'results.json'}")
        if tasks:
            print(f"evaluating {weights} on {len(tasks)} tasks, on {' '.join(devices)}", flush=True)
        yield Evaluation(config, weights, stamp, tuple(entries), tasks, results, earlier, load)


def _evaluate_all(evaluation: Evaluation, devices: Sequence[str]) -> None:
    """Evaluate on every device. A task in which a process is killed fails; new processes evaluate those after it.

    Raises:
        ProcessKilledError: a process was killed before the first task began.
    """
    tasks = list(evaluation.tasks)
    with tempfile.TemporaryDirectory(prefix="llip-evals-") as folder:
        while tasks:
            progress = Path(folder, f"{len(tasks)}_tasks")
            try:
                launch(_work, devices, evaluation, tasks, progress)
                return
            except ProcessKilledError as death:
                if not progress.exists():
                    raise ProcessKilledError(f"{death}, before the first task began") from death
                remaining = tasks[progress.read_text().count("done") :]
                if not remaining:  # killed at its exit
                    return
                failed, *tasks = remaining
                (entry,) = (entry for entry in evaluation.entries if entry.name == failed)
                reason = f"{death}; with less batch_size or workers it may fit into memory"
                evaluation = replace(evaluation, results=_stored(evaluation))
                evaluation.results.add(TaskResult(failed, entry.metric, error=reason))


def _work(device: str, evaluation: Evaluation, tasks: Sequence[str], progress: Path) -> None:
    """Evaluate on one device, together with the other processes; the main one writes the results.

    Args:
        device: of this process.
        tasks: names, in the order in which they are evaluated.
        progress: a file for the launcher, which appears when the model is loaded and counts the tasks done.
    """
    config, results = evaluation.config, evaluation.results
    processes = Processes.of_group()
    with raise_on_all_ranks(processes, CollectiveUserError, _user_message):
        model = evaluation.load(config).to(device).eval()
        if _stamp(evaluation.weights) != evaluation.stamp:  # as latest.pt does while a run trains
            raise UserError(f"{evaluation.weights} changed while it was loaded; evaluate a step_<N>.pt, or try again")
    if processes.is_main:
        progress.touch()

    def record(result: TaskResult) -> None:
        with raise_on_all_ranks(processes, CollectiveUserError, _user_message):
            if processes.is_main:
                results.add(result)
                with progress.open("a") as file:
                    file.write("done\n")

    evaluate_tasks(
        model,
        [entry for entry in evaluation.entries if entry.name in tasks],
        config,
        device=device,
        autocast_dtype=autocast_dtype(results.model.precision),
        cache_dir=config.cache_folder,
        on_result=record,
    )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _stored(evaluation: Evaluation) -> ResultsFile:
    """Read the results that the evaluating processes have written."""
    return ResultsFile(evaluation.results.folder, evaluation.results.model)


def _report(evaluation: Evaluation) -> int:
    """Print the results and draw them; return the exit code."""
    results, names = _stored(evaluation), [entry.name for entry in evaluation.entries]
    done = results.tasks(names)
    print(format_results(done))
    files = [results.folder / "results.json", results.folder / "results.md"]
    try:
        chart = draw(results, names, evaluation.earlier, evaluation.config.references)
        files += [chart] if chart else []
    except OSError as error:
        print(f"warning: the chart cannot be written: {error}", file=sys.stderr)
    print(f"results: {', '.join(map(str, files))}")
    for note in notes(done):
        print(f"warning: {note}", file=sys.stderr)
    failed = [result for result in done if result.error]
    for result in failed:
        print(f"error: {result.task}: {result.error}", file=sys.stderr)
    return 1 if failed else 0


def draw(
    results: ResultsFile, tasks: Sequence[str], earlier: Sequence[StoredResults], references: Mapping[str, float]
) -> Path | None:
    """Write results.png: the classification tasks, their mean, and R@1 of retrieval, beside earlier results.

    A side that lacks one of the tasks has no mean; reference averages are lines.

    Returns:
        The file, None if no task has a value.
    """
    done = [result for result in results.tasks(tasks) if result.values]
    if not done:
        return None
    classified = [(result, result.metric) for result in done if result.value is not None]
    retrieved = [(result, f"{way}_R@1") for result in done if result.value is None for way in WAYS]
    sides = {}
    current = {result.task: result for result in done}
    for name, stored in [("this evaluation", current), *((side.name, side.tasks) for side in earlier)]:
        values, recalls = (
            [_percent(stored.get(result.task), result, value) for result, value in shown]
            for shown in (classified, retrieved)
        )
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known and len(known) == len(values) else None
        sides[name] = [*values, *([mean] if classified else []), *recalls]
    labels = [result.task if metric == "top1" else f"{result.task} ({metric})" for result, metric in classified]
    labels += [f"mean of these {len(classified)}"] if classified else []
    rules = [len(classified), len(classified) + 1] if classified else []
    labels += [f"{result.task} ({value})" for result, value in retrieved]
    chart = results.folder / "results.png"
    bar_chart(chart, f"Zero-shot results of {results.model.title}", labels, sides, references, rules)
    return chart


def _percent(result: TaskResult | None, like: TaskResult, value: str) -> float | None:
    """Return a value of `result`, None if it does not measure the same as `like`."""
    if result is None or (result.metric, result.shortlist) != (like.metric, like.shortlist):
        return None
    return 100 * result.values[value] if value in result.values else None
