"""Results as tables in percent, aligned for a screen or as Markdown."""

from collections.abc import Iterable, Sequence

from llip.clipeval.metrics import RECALLS, RETRIEVAL_METRICS
from llip.clipeval.task_result import TaskResult, classification_mean
from llip.system.tables import aligned_table, markdown_table

_DIRECTIONS = {"image_to_text": "image→text", "text_to_image": "text→image"}


def format_results(results: Iterable[TaskResult], markdown: bool = False) -> str:
    """Return a table of the classification tasks with their mean, and one of the retrieval tasks."""
    results = list(results)
    tables = [_classification(results), _retrieval(results)]
    write = markdown_table if markdown else aligned_table
    return "\n\n".join(write(rows) for rows in tables if len(rows) > 1)


def notes(results: Iterable[TaskResult]) -> list[str]:
    """Return a line for each task with unreadable images: how many, and the first of them."""
    return [
        f"{result.task}: {result.skipped} of {result.n + result.skipped} images cannot be read and are skipped, "
        f"for instance {result.skipped_images[0]}"
        for result in results
        if result.skipped
    ]


def _classification(results: Sequence[TaskResult]) -> list[list[str]]:
    rows = [["task", "metric", "%", "images", "skipped", "seconds", "images/s"]]
    shown = [result for result in results if result.metric not in RETRIEVAL_METRICS]
    for result in shown:
        first = "failed" if result.value is None else _percent(result.value)
        rows.append([result.task, result.metric, first, str(result.n), str(result.skipped), *_speed(result)])
        others = [(metric, value) for metric, value in result.values.items() if metric != result.metric]
        rows += [[result.task, metric, _percent(value), "", "", "", ""] for metric, value in others]
    if (mean := classification_mean(shown)) is not None:
        failed = sum(result.value is None for result in shown)
        over = f"of {len(shown) - failed} classification tasks" + (f", {failed} failed" if failed else "")
        rows.append(["mean", over, _percent(mean), "", "", "", ""])
    return rows


def _retrieval(results: Sequence[TaskResult]) -> list[list[str]]:
    columns = [(way, k) for way in _DIRECTIONS for k in RECALLS]
    heads = [f"{_DIRECTIONS[way]} R@{k}" if k == RECALLS[0] else f"R@{k}" for way, k in columns]
    rows = [["task", "pairs scored", *heads, "images", "texts", "skipped", "seconds", "images/s"]]
    for result in results:
        if result.metric in RETRIEVAL_METRICS:
            scored = "all" if result.shortlist is None else f"shortlist {result.shortlist}"
            values = [result.values.get(f"{way}_R@{k}") for way, k in columns]
            recalls = ["failed" if value is None else _percent(value) for value in values]
            counts = [str(result.n), str(result.texts or 0), str(result.skipped)]
            rows.append([result.task, scored, *recalls, *counts, *_speed(result)])
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _speed(result: TaskResult) -> list[str]:
    return [f"{result.seconds:.1f}", f"{result.images_per_second:.0f}"]
