"""Record the samples of each step in `sample_ids/process_<rank>.jsonl`, to audit a resumed run.

    {"step": 12, "ids": ["00003.tar/000030417", ...]}

A step has one line per micro-batch. After a restart the files are cut back to the checkpoint.
"""

from pathlib import Path

from llip.training.checkpoints.records import BestEffort, append_record, cut_back

FOLDER = "sample_ids"


def cut_back_ids(folder: Path, step: int) -> None:
    """Create the folder, and cut the files of all processes back to `step`; called by one process.

    Raises:
        OSError: a file cannot be written; names it.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    for path in (folder / FOLDER).glob("*.jsonl"):
        cut_back(path, step)


class SampleLog:
    """Writes the ids of one process's samples."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Write below the run's folder, in the folder that `cut_back_ids` has created."""
        self.path = folder / FOLDER / f"process_{rank}.jsonl"
        self._gaps = BestEffort(str(self.path))

    def add(self, step: int, ids: list[str]) -> None:
        """Record the samples `ids` of a step, in order; what the disk does not take is lost, with a warning."""
        with self._gaps.allowed():
            append_record(self.path, {"step": step, "ids": ids})

    def close(self) -> None:
        """Report what was lost."""
        self._gaps.close()
