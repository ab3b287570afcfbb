"""The result of one task: the object of results.json and evals.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llip.clipeval.outcomes import Outcomes


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        task, metric: the entry's name and its first metric.
        values: fractions in [0, 1]: metric -> value, or six recalls in retrieval; empty after an error.
        n: images scored. texts: captions scored (retrieval).
        seconds: wall time of the slowest process; images_per_second: n over that, all processes together.
        skipped: images that could not be read; skipped_images: the first of them, by name and reason.
        error: why the task could not be evaluated, or None.
        classnames_hash, prompts_hash: first digits of SHA-256; in retrieval prompts_hash is that of the captions.
        fingerprint: the catalog entry's. inputs: of the entry, texts and data files, see `inputs.task_inputs`.
        shortlist: candidates that retrieval scored exactly per query; None: everything was.
        samples: hash of the images scored, see `outcomes.hash_samples`.
        outcomes: of each image; not part of the json. None after an error and when read back.
    """

    task: str
    metric: str
    values: dict[str, float] = field(default_factory=dict)
    n: int = 0
    texts: int | None = None
    seconds: float = 0.0
    images_per_second: float = 0.0
    skipped: int = 0
    skipped_images: tuple[str, ...] = ()
    error: str | None = None
    classnames_hash: str | None = None
    prompts_hash: str | None = None
    fingerprint: str | None = None
    shortlist: int | None = None
    samples: str | None = None
    inputs: Mapping[str, str] | None = None
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)

    @property
    def value(self) -> float | None:
        """The first metric's value, None for retrieval (see `values`) and after an error."""
        return self.values.get(self.metric)

    def to_json(self) -> dict[str, Any]:
        """Return the task's object in results.json and evals.jsonl: metric, value (or the recalls), n, seconds, ...

        With several metrics, `values` has all of them, and `metric` and `value` are the first.
        """
        values: dict[str, Any] = dict(self.values)
        if self.value is not None:
            values = {"value": self.value, **({"values": values} if len(values) > 1 else {})}
        shown = {"task", "metric", "values", "outcomes"}
        rest = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in shown}
        return {"metric": self.metric, **values, **{key: value for key, value in rest.items() if value is not None}}

    @classmethod
    def from_json(cls, task: str, stored: dict[str, Any]) -> "TaskResult":
        """Read back what `to_json` wrote; fields of later versions are ignored.

        Raises:
            TypeError, ValueError, KeyError: not what it wrote.
        """
        values = {key: value for key, value in stored.items() if "_R@" in key}
        if "value" in stored:
            values = {stored["metric"]: stored["value"], **stored.get("values", {})}
        for name, value in values.items():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{task}, {name}: {value!r} is not a fraction")
        known = {item.name for item in fields(cls)} & stored.keys() - {"task", "values"}
        rest = {name: stored[name] for name in known}
        return cls(task=task, values=values, **rest | {"skipped_images": tuple(stored.get("skipped_images", ()))})


def classification_mean(results: Sequence[TaskResult]) -> float | None:
    """Return the mean of the classification tasks' values, None without any."""
    values = [result.value for result in results if result.value is not None]
    return sum(values) / len(values) if values else None
