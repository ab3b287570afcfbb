"""Which samples each step used: `sample_ids/process_<rank>.jsonl`, so that anyone can check a resumed run.

    {"step": 12, "ids": ["00003.tar/000030417", ...]}

A step has one line per accumulation slice. After a restart the files are cut back to the checkpoint.
"""

from pathlib import Path

from llip.training.checkpoints.records import BestEffort, append_record, cut_back

FOLDER = "sample_ids"


def cut_back_ids(folder: Path, step: int) -> None:
    """Make the place of the files, and drop what lies after `step` from those of all processes; for one process.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    for path in (folder / FOLDER).glob("*.jsonl"):
        cut_back(path, step)


class SampleLog:
    """Writes the ids of one process's samples."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Write below the run's folder, where `cut_back_ids` has made the place."""
        self.path = folder / FOLDER / f"process_{rank}.jsonl"
        self._gaps = BestEffort(str(self.path))

    def add(self, step: int, ids: list[str]) -> None:
        """Note that a step uses the samples `ids`, in order; what the disk does not take is lost, with a warning."""
        with self._gaps.allowed():
            append_record(self.path, {"step": step, "ids": ids})

    def close(self) -> None:
        """Say what is lost."""
        self._gaps.close()
