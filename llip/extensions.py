"""Names that a config may use for poolings and objectives, and how a user's own file adds one. Imports no torch."""

import filecmp
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llip.errors import UserError, did_you_mean

Thing = TypeVar("Thing")


class Registry:
    """What is called by a name in configs and checkpoints; imported when it is first needed."""

    def __init__(self, what: str, shipped: dict[str, str]) -> None:
        """Begin with what the project ships.

        Args:
            what: one of these is called in messages.
            shipped: name -> `module:attribute`.
        """
        self.what = what
        self._places: dict[str, str] = dict(shipped)
        self._things: dict[str, Any] = {}
        self._sources: dict[str, str] = {}  # of what was registered: the file that did it

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """Decorate what configs may call `name` from now on; a file with a config of one's own is the place for it.

        Raises:
            UserError: the name is taken.
        """
        source = str(Path(sys._getframe(1).f_code.co_filename).resolve())

        def add(thing: Thing) -> Thing:
            if name in self._places:
                raise UserError(f"{self.what} {name!r} is there already; give yours another name")
            if name in self._sources:  # the same file may be read twice: by its path, as a module, as a job's copy
                other = self._sources[name]
                if not _same_file(other, source) or _called(self._things[name]) != _called(thing):
                    raise UserError(f"{self.what} {name!r} is there already, from {other}; give yours another name")
            self._things[name], self._sources[name] = thing, source
            return thing

        return add

    def find(self, name: str) -> Any:
        """Return what is called `name`, or raise the `UserError` that names the nearest one."""
        if name not in self:
            raise UserError(
                f"unknown {self.what} {name!r}.{did_you_mean(name, self)} One of your own is known once the file that "
                "registers it has been read, for instance with a config in it: path/to/file.py:function"
            )
        if name not in self._things:
            module, _, attribute = self._places[name].partition(":")
            self._things[name] = getattr(importlib.import_module(module), attribute)
        return self._things[name]

    def source(self, name: str) -> Path | None:
        """Return the file that registered `name`; None for what the project ships.

        Raises:
            UserError: it was not registered in a file, so that no other process can read it.
        """
        if name not in self._sources:
            return None
        path = Path(self._sources[name])
        if not path.is_file():
            raise UserError(
                f"{self.what} {name!r} was registered in {self._sources[name]!r}, which is no file, and other "
                "processes need one; put it into path/to/file.py, beside a config that names it"
            )
        return path

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._things]))


def _same_file(one: str, other: str) -> bool:
    if one == other:
        return True
    return Path(one).is_file() and Path(other).is_file() and filecmp.cmp(one, other, shallow=False)


def _called(thing: Any) -> str | None:
    return getattr(thing, "__qualname__", None)


poolings = Registry(
    "pooling",
    {
        "first": "llip.open_clip.pooling:FirstToken",
        "mean": "llip.open_clip.pooling:MeanTokens",
        "learned": "llip.open_clip.pooling:LearnedWeights",
        "text": "llip.open_clip.pooling:TextConditionedPooling",
    },
)
objectives = Registry(
    "loss", {"sigmoid": "llip.open_clip.objectives:SIGMOID", "softmax": "llip.open_clip.objectives:SOFTMAX"}
)
