"""Checks before a job is submitted."""

import os
import shutil
import tempfile
from pathlib import Path

from llip.configs import Config
from llip.errors import UserError
from llip.training.checkpoints.run_folder import locked_folder

_RUNS_FIRST = "scenes:"
_NOT_CHECKED = ("pipe:", "http:", "https:")


def check_training(config: Config) -> list[str]:
    """Check what a run will need without changing anything.

    Returns:
        Sentences about what is not checked.

    Raises:
        UserError: what the run would stop at.
    """
    from llip.training.setup import check_request

    notes = [*_check_data(config), *_check_weights(config)]
    check_request(config)
    return notes


def check_evaluations(files: tuple[str, ...]) -> None:
    """Check that evaluation files, their catalogs and their tasks are there.

    Raises:
        UserError: one is not, or is wrong.
    """
    from llip.clipeval.catalog.catalog import load_evaluation

    for file in files:
        load_evaluation(file)


def check_folder(folder: Path) -> list[str]:
    """Create a run's folder, and check that it can be written and is not in use.

    Returns:
        A sentence if the nodes may not see the folder.

    Raises:
        UserError: it cannot be written, or is in use.
    """
    with locked_folder(folder):
        pass
    temporary = Path(tempfile.gettempdir()).resolve()
    if folder.resolve().is_relative_to(temporary):
        return [f"{folder} lies in {temporary}, which the nodes of a cluster usually do not share"]
    return []


def check_slurm() -> None:
    """Check that SLURM's programs are here.

    Raises:
        UserError: they are not.
    """
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"no {program} on this machine: run this on a SLURM login node, use --dry-run to see the script, or "
                "run without SLURM: python -m llip.main, python -m evals.main_mc"
            )


def _check_data(config: Config) -> list[str]:
    from llip.data.sources import check_shards_exist, parse_train_data

    if not config.train_data:
        parse_train_data(config.train_data)  # raises the error that describes the field
    parts = config.train_data.split("::")
    here = [part for part in parts if not part.startswith((_RUNS_FIRST, *_NOT_CHECKED))]
    if here:
        check_shards_exist(parse_train_data("::".join(here)))
    return [
        f"{part} is not checked before the run" + ("; it is written if missing" if part.startswith(_RUNS_FIRST) else "")
        for part in parts
        if part not in here
    ]


def _check_weights(config: Config) -> list[str]:
    """Check the files that fields may name; a bare word may be a name in open_clip, which the run looks up."""
    notes = []
    for field in ("model", "pretrained", "resume"):
        value = getattr(config, field)
        if value is None or (field == "resume" and value == "latest") or Path(value).is_file():
            continue
        if os.sep in value:
            raise UserError(f"{field} = {value!r} is not there (looked from {Path.cwd()})")
        if field == "pretrained":
            notes.append(f"pretrained = {value!r} is not a file; the run takes it for an OpenCLIP tag")
    return notes
