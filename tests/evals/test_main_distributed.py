"""Evaluation by the tasks of a SLURM job, which two processes with SLURM's variables stand for."""

import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASK = "from evals.main_distributed import EvaluationProgram; EvaluationProgram('mc.yaml', '.', 'cpu')()"

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a small model, its evaluation `mc.yaml`, and what that gave in one process (expected.json)."""
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_eda9cc8.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run_tasks(folder: Path, count: int = 2) -> list[tuple[int, str, str]]:
    """Run the job's tasks; return (exit code, standard output, standard error) of each."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    job = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": str(count)}
    job |= {"SLURM_JOB_NODELIST": "here", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TASK], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=kept | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        printed = [task.communicate(timeout=90) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, *texts) for task, texts in zip(tasks, printed, strict=True)]


@pytest.mark.slow
def test_the_tasks_share_the_evaluation_and_the_first_reports(folder: Path) -> None:
    (code, out, err), other = run_tasks(folder)
    assert code == 0, err
    assert other[:2] == (0, "")
    expected = json.loads((folder / "expected.json").read_text())["tasks"]
    results = json.loads((folder / "results" / "results.json").read_text())["tasks"]
    for task, values in expected.items():
        assert {key: results[task][key] for key in values} == values
        assert task in out
    ((code, out, _), other) = run_tasks(folder)
    assert (code, other[:2]) == (0, (0, ""))
    assert f"{len(expected)} of {len(expected)} tasks are done already" in out


@pytest.mark.slow
def test_a_mistake_ends_every_task_with_one_message(folder: Path) -> None:
    (folder / "logs" / "run" / "checkpoints" / "latest.pt").unlink()
    first, other = run_tasks(folder)
    assert (first[0], other[0]) == (2, 2)
    assert first[2].count("is not there; train it with") == 1
    assert other[1:] == ("", "")
