"""Handing a job to SLURM, with programs that stand in for SLURM's."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llip.cluster.options import Shape, SlurmOptions, sbatch_parameters
from llip.cluster.submit import JobRequest
from llip.errors import UserError


def nothing() -> int:
    """What the tasks of these jobs would run."""
    return 0


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a program called sbatch first, which notes its environment and then does as the test says."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def write(then: str) -> Path:
        program = tmp_path / "bin" / "sbatch"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n{then}\n")
        program.chmod(0o755)
        shutil.copyfile("/bin/true", srun := program.with_name("srun"))  # submitit looks for it before an array
        srun.chmod(0o755)
        return tmp_path / "environment"

    return write


def request(folder: Path, tasks: int = 1) -> JobRequest:
    parameters = sbatch_parameters(SlurmOptions(time=90), Shape(2, 4, 3, gpu=True), "mine", ["export A=1"])
    return JobRequest(folder / "slurm", parameters, [nothing] * tasks, 1000)


def test_the_script_asks_for_what_was_asked_for(tmp_path: Path):
    lines = request(tmp_path).script().splitlines()
    expected = {"nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=3", "time=90", "requeue",
                "signal=USR2@180", "job-name=mine", "open-mode=append"}  # fmt: skip
    assert {f"#SBATCH --{option}" for option in expected} <= set(lines)
    assert lines.index("export A=1") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert not (tmp_path / "slurm").exists()


def test_the_script_of_an_array_counts_its_runs(tmp_path: Path):
    script = request(tmp_path, tasks=3).script()
    assert "#SBATCH --array=0-2%3" in script
    assert f"#SBATCH --error={tmp_path}/slurm/%A_%a_0_log.err" in script


def test_the_job_is_submitted_with_its_task(sbatch, tmp_path: Path):
    sbatch("echo Submitted batch job 77")
    assert request(tmp_path).submit() == ["77"]
    assert (tmp_path / "slurm" / "77_submitted.pkl").is_file()
    assert (tmp_path / "slurm" / "77_submission.sh").read_text() == request(tmp_path).script()


def test_an_array_has_a_task_for_each_run(sbatch, tmp_path: Path):
    sbatch("echo Submitted batch job 78")
    assert request(tmp_path, tasks=2).submit() == ["78_0", "78_1"]
    assert {path.name for path in (tmp_path / "slurm").glob("*.pkl")} == {"78_0_submitted.pkl", "78_1_submitted.pkl"}


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("echo 'sbatch: error: invalid partition specified: gpux' >&2; exit 1", "invalid partition specified: gpux"),
        ("echo 'sbatch: error: Invalid generic resource (gres) specification' >&2; exit 1", "device=cpu"),
        ("exit 124", "no answer within"),
        ("echo hello", "hello"),
    ],
)
def test_a_refusal_is_told_in_slurms_words(sbatch, tmp_path: Path, then: str, message: str):
    sbatch(then)
    with pytest.raises(UserError, match="SLURM does not accept the job") as refused:
        request(tmp_path).submit()
    assert message in str(refused.value)


def test_a_job_that_submits_a_job_does_not_pass_its_own_settings_on(sbatch, tmp_path: Path, monkeypatch):
    own = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "16", "RANK": "3", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "lo"}
    kept = {"SLURM_CONF": "/somewhere/slurm.conf", "LLIP_SCENES": "/data"}
    for name, value in (own | kept).items():
        monkeypatch.setenv(name, value)
    printed = sbatch("echo Submitted batch job 79")
    request(tmp_path).submit()
    environment = dict(line.split("=", 1) for line in printed.read_text().splitlines() if "=" in line)
    assert {name: environment.get(name) for name in kept} == kept
    assert not own.keys() & environment.keys()
    assert os.environ["SLURM_JOB_ID"] == "5"


def test_at_a_terminal_the_users_own_settings_stay(sbatch, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    printed = sbatch("echo Submitted batch job 80")
    request(tmp_path).submit()
    assert "SBATCH_ACCOUNT=lab" in printed.read_text().splitlines()


def test_the_parameters_travel_as_json():
    """As the options of evaluation jobs do."""
    parameters = sbatch_parameters(SlurmOptions(), Shape(1, 1, 3, gpu=True), "mine", ["true"])
    assert json.loads(json.dumps(parameters)) == parameters
