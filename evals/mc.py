"""The program `mc`: evaluate one checkpoint zero-shot on the tasks of a catalog, task by task, on every device."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from evals.chart import bar_chart
from evals.main_distributed import launch
from evals.results import CheckpointIdentity, ModelIdentity, ResultsFile, StoredResults, locked_output, read_results
from evals.tables import format_results, notes
from llip.clipeval.catalog.catalog import Entry, load_catalog
from llip.clipeval.eval_config import EvalConfig
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.inputs import task_inputs
from llip.clipeval.task_result import TaskResult
from llip.config_search import search_config
from llip.errors import UserError
from llip.open_clip.model import autocast_dtype
from llip.system.paths import expand_path, unset_variables
from llip.system.processes import Processes

WAYS = ("image_to_text", "text_to_image")

LoadModel = Callable[[Path, EvalConfig], nn.Module]


def load_model(path: Path, config: EvalConfig) -> nn.Module:
    """Load the checkpoint and hold it against the run config that the evaluation names.

    Raises:
        UserError: an unreadable checkpoint, or a model of another architecture (lists the differing fields).
    """
    import llip
    from llip.open_clip.factory import check_model_matches

    model = llip.load_pretrained(path, ema=config.ema)
    check_model_matches(model, search_config(config.mc_config_name))
    return model


def run(config: EvalConfig, devices: Sequence[str], load: LoadModel = load_model) -> int:
    """Evaluate and print a table; return 0, or 1 when some task could not be evaluated.

    Args:
        config: with checkpoint, run config and output folder. devices: one process each.
        load: gives the model, carrying `.preprocess_val` and `.tokenizer`; importable, for it travels to the processes.

    Raises:
        UserError: unknown run config, catalog or task, missing checkpoint or earlier results; an output folder
            that cannot be written or that another evaluation uses.
    """
    precision = _precision(config, devices)
    checkpoint = _find_checkpoint(config)
    catalog = load_catalog(config.catalog_name)
    wanted = catalog.select(config.tasks)
    model = ModelIdentity(
        config=config.mc_config_name + (" (averaged weights)" if config.ema else ""),
        checkpoint=CheckpointIdentity.of(checkpoint),
        prompt_ensemble=config.prompt_ensemble,
        precision=precision,
    )
    earlier = [read_results(path) for path in config.compare_with]
    with locked_output(expand_path(config.output_dir)):
        results = _evaluate(config, devices, load, checkpoint, wanted, model)
        return _report(config, results, wanted, earlier)


def _evaluate(
    config: EvalConfig,
    devices: Sequence[str],
    load: LoadModel,
    checkpoint: Path,
    wanted: Sequence[Entry],
    model: ModelIdentity,
) -> ResultsFile:
    """Evaluate the tasks that are not done and return all results."""
    results = ResultsFile(expand_path(config.output_dir), model)
    if results.set_aside is not None:
        print(f"earlier results are of another model or protocol; they will be kept in {results.set_aside}")
    changes = {entry.name: results.changes(entry, config.shortlist, task_inputs(entry)) for entry in wanted}
    tasks = [name for name, why in changes.items() if why is None or why]
    for name in tasks:
        if why := changes[name]:
            print(f"{name} is evaluated again: {', '.join(why)}")
    if kept := len(wanted) - len(tasks):
        print(f"{kept} of {len(wanted)} tasks are done already: {results.folder / 'results.json'}")
    if tasks:
        print(f"evaluating {checkpoint} on {len(tasks)} tasks, on {' '.join(devices)}")
        launch(_work, devices, config, tasks, results, checkpoint, load)
        results = ResultsFile(results.folder, model)
    return results


def _report(config: EvalConfig, results: ResultsFile, wanted: Sequence[Entry], earlier: Sequence[StoredResults]) -> int:
    """Print the results, draw the chart, and return the exit code."""
    done = results.tasks(entry.name for entry in wanted)
    print(format_results(done))
    chart = draw(results, [entry.name for entry in wanted], earlier, config.references)
    files = [results.folder / "results.json", results.folder / "results.md", *([chart] if chart else [])]
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

    The mean of a side is over all tasks shown, and missing where the side lacks one; reference averages are lines.
    Return None when no task gave a value.
    """
    found = [result for result in results.tasks(tasks) if result.values]
    if not found:
        return None
    classified = [result for result in found if result.value is not None]
    retrieved = [(result, f"{way}_R@1") for result in found if result.value is None for way in WAYS]
    sides = {}
    everything = {result.task: result for result in found}
    for name, stored in [("this evaluation", everything), *((side.name, side.tasks) for side in earlier)]:
        values = [_percent(stored.get(one.task), one, one.metric) for one in classified]
        mean = [None if None in values else sum(values) / len(values)] if classified else []
        sides[name] = [*values, *mean, *(_percent(stored.get(one.task), one, value) for one, value in retrieved)]
    labels = [one.task if one.metric == "top1" else f"{one.task} ({one.metric})" for one in classified]
    labels += [f"mean of these {len(classified)}"] if classified else []
    rules = [len(classified), len(classified) + 1] if classified else []
    labels += [f"{one.task} ({value})" for one, value in retrieved]
    chart = results.folder / "results.png"
    bar_chart(chart, f"Zero-shot results of {results.model.config}", labels, sides, references, rules)
    return chart


def _percent(result: TaskResult | None, other: TaskResult, value: str) -> float | None:
    """Return one side's value where it measured the same as the other."""
    if result is None or (result.metric, result.shortlist) != (other.metric, other.shortlist):
        return None
    return 100 * result.values[value] if value in result.values else None


def _work(
    device: str, config: EvalConfig, tasks: list[str], results: ResultsFile, checkpoint: Path, load: LoadModel
) -> None:
    """What each process does; the first one writes the results."""
    model = load(checkpoint, config).to(device).eval()
    first = Processes.of_group().is_main
    evaluate_tasks(
        model,
        model.preprocess_val,
        model.tokenizer,
        tasks,
        load_catalog(config.catalog_name),
        device=device,
        autocast_dtype=autocast_dtype(results.model.precision),
        batch_size=config.batch_size,
        workers=config.workers,
        prompt_ensemble=config.prompt_ensemble,
        shortlist=config.shortlist,
        cache_dir=config.cache_folder,
        on_result=results.add if first else None,
    )


def _precision(config: EvalConfig, devices: Sequence[str]) -> str:
    run_config = search_config(config.mc_config_name)
    return "fp32" if devices[0] == "cpu" else run_config.precision


def _find_checkpoint(config: EvalConfig) -> Path:
    path = expand_path(config.checkpoint_path)
    if path.is_file():
        return path
    if unset := unset_variables(path):
        raise UserError(f"checkpoint {path} is not there: the environment variable {unset[0]} is not set")
    train = f"python -m llip.main {config.mc_config_name}"
    raise UserError(f"checkpoint {path} is not there; train it with `{train}`, or set checkpoint_path in the YAML")
