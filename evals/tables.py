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
    """Return a line for each task with images that could not be read: how many, and the first of them."""
    return [
        f"{one.task}: {one.skipped} of {one.n + one.skipped} images cannot be read and are left out, for instance "
        f"{one.skipped_images[0]}"
        for one in results
        if one.skipped
    ]


def _classification(results: Sequence[TaskResult]) -> list[list[str]]:
    rows = [["task", "metric", "%", "images", "skipped", "seconds", "images/s"]]
    some = [result for result in results if result.metric not in RETRIEVAL_METRICS]
    for one in some:
        value = "failed" if one.value is None else _percent(one.value)
        rows.append([one.task, one.metric, value, str(one.n), str(one.skipped), *_speed(one)])
        others = [(metric, value) for metric, value in one.values.items() if metric != one.metric]
        rows += [[one.task, metric, _percent(value), "", "", "", ""] for metric, value in others]
    if (mean := classification_mean(some)) is not None:
        failed = sum(one.value is None for one in some)
        over = f"of {len(some) - failed} classification tasks" + (f", {failed} failed" if failed else "")
        rows.append(["mean", over, _percent(mean), "", "", "", ""])
    return rows


def _retrieval(results: Sequence[TaskResult]) -> list[list[str]]:
    columns = [(way, k) for way in _DIRECTIONS for k in RECALLS]
    heads = [f"{_DIRECTIONS[way]} R@{k}" if k == RECALLS[0] else f"R@{k}" for way, k in columns]
    rows = [["task", "pairs scored", *heads, "images", "texts", "skipped", "seconds", "images/s"]]
    for one in results:
        if one.metric in RETRIEVAL_METRICS:
            scored = "all" if one.shortlist is None else f"shortlist {one.shortlist}"
            found = [one.values.get(f"{way}_R@{k}") for way, k in columns]
            values = ["failed" if value is None else _percent(value) for value in found]
            rows.append([one.task, scored, *values, str(one.n), str(one.texts or 0), str(one.skipped), *_speed(one)])
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _speed(result: TaskResult) -> list[str]:
    return [f"{result.seconds:.1f}", f"{result.images_per_second:.0f}"]
