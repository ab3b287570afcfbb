"""What became of a file's weights: counts, names, and the nearest names of what did not fit."""

import dataclasses
from collections.abc import Iterable

from llip.errors import nearest

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The outcome of loading weights into a model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the model and not in the file: they keep their fresh values."""
    unexpected: tuple[str, ...]
    """In the file and not in the model."""
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the file, shape in the model) of what does not fit."""
    notes: tuple[str, ...] = ()
    """What was done to make the file's weights fit, one sentence each."""

    def summary(self, source: str) -> str:
        """Return one paragraph for the log."""
        text = (
            f"{source}: {len(self.loaded)} tensors loaded, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.reshaped)} of another shape"
        )
        for label, names in (("fresh", self.missing), ("left over", self.unexpected)):
            if names:
                text += f"; {label}: {_shorten(names)}"
        return "; ".join([text, *self.notes])

    def problems(self, missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
        """Return one line per name in `missing`, in `unexpected`, and per tensor of another shape."""
        missing, unexpected = list(missing), list(unexpected)
        lines = [f"missing {key}" for key in missing]
        lines += [f"unexpected {key} (nearest: {', '.join(nearest(key, missing, 1)) or 'none'})" for key in unexpected]
        return lines + [f"{key} is {shape}, expected {expected}" for key, shape, expected in self.reshaped]


def join_reports(reports: Iterable[LoadReport]) -> LoadReport:
    """Return one report of the files that several parts of a model were loaded from."""
    fields = [field.name for field in dataclasses.fields(LoadReport)]
    parts = list(reports)
    return LoadReport(**{name: tuple(x for part in parts for x in getattr(part, name)) for name in fields})


def _shorten(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
