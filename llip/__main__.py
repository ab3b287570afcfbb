"""All programs in one command: `llip <program>` or `python -m llip <program>`. Imports no torch."""

import importlib
import sys
from collections.abc import Sequence

from llip.errors import UserError, did_you_mean
from llip.system.program import program

PROGRAMS = {
    "train": ("llip.main:main", "train a config, or resume its run"),
    "eval": ("evals.main_mc:main", "evaluate a checkpoint zero-shot"),
    "submit": ("submitit_openclip:main", "train a config on a SLURM cluster"),
    "doctor": ("llip.data.doctor.__main__:main", "validate shards and write an index of their sample counts"),
    "pack": ("llip.data.pack.__main__:main", "pack images and captions into shards"),
    "encode": ("llip.tools.encode.__main__:main", "compute the features of frozen towers once, to train on them"),
    "plan": ("llip.tools.plan.__main__:main", "predict memory and time of a run"),
    "explain": ("llip.tools.explain.__main__:main", "draw what a model attends to for a caption"),
    "diagnose": ("llip.tools.diagnose.__main__:main", "measure what the mixture tokens of a model do"),
    "search": ("llip.tools.search.__main__:main", "find images in a folder by text"),
    "export": ("llip.tools.export.__main__:main", "write a checkpoint as a folder for the Hugging Face hub"),
    "rehearse": ("llip.training.debug.rehearse:main", "measure how long a run takes to stop and resume"),
    "replay": ("llip.training.debug.replay:main", "recompute a step whose loss or gradient was not finite"),
    "compare": ("evals.compare:main", "compare the results of evaluations"),
    "catalog": ("llip.clipeval.catalog.__main__:main", "check the datasets of a catalog on this machine"),
    "scenes": ("llip.scenes.__main__:main", "write the embedded dataset"),
}
"""Name -> (module:function, one line about it)."""


def programs_text() -> str:
    """Return one line per program."""
    lines = [f"  {name:10}{about}" for name, (_, about) in PROGRAMS.items()]
    return "usage: llip <program> [arguments]; llip <program> --help explains each\n\n" + "\n".join(lines)


@program
def main(arguments: Sequence[str]) -> int | None:
    """Run one program with the rest of the command line, or list them all."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(programs_text())
        return None
    if arguments[0] == "--version":
        from llip import __version__

        print(f"llip {__version__}")
        return None
    name, *rest = arguments
    if name not in PROGRAMS:
        raise UserError(f"unknown program {name!r}.{did_you_mean(name, PROGRAMS)} (llip lists all programs)")
    module, _, function = PROGRAMS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)(rest)


if __name__ == "__main__":
    sys.exit(main())
