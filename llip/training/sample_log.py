"""Which samples each step used: `sample_ids/process_<rank>.jsonl`, so that anyone can check a resumed run.

    {"step": 12, "ids": ["00003.tar/000030417", ...]}

A step has one line per accumulation slice. After a restart the files are cut back to the checkpoint.
"""

import json
from pathlib import Path

from llip.training.run_folder import cut_back

FOLDER = "sample_ids"


def cut_back_ids(folder: Path, step: int) -> None:
    """Drop what lies after `step` from the files of all processes; for one process."""
    for path in (folder / FOLDER).glob("*.jsonl"):
        cut_back(path, step)


class SampleLog:
    """Writes the ids of one process's samples."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Write below the run's folder."""
        self.path = folder / FOLDER / f"process_{rank}.jsonl"
        self.path.parent.mkdir(exist_ok=True)

    def add(self, step: int, ids: list[str]) -> None:
        """Note that a step uses the samples `ids`, in order."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "ids": ids}) + "\n")
