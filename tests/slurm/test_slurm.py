"""The proof on a real Slurm: jobs are submitted, requeued, warned and failed, and nothing is lost.

The quickstart's model on two CPU tasks. All jobs run at the same time, and the code that one was submitted from is
broken right after the submission.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.forked import ROOT, start_server
from tests.helpers import image_bytes, write_pairs
from tests.slurm.cluster import Cluster, losses, read_lines, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # the first one installs Slurm where it is not; each wait has its own deadline

EPOCH, EPOCHS = 12, 3  # steps, epochs
STEPS = EPOCH * EPOCHS
STOP_AFTER = (EPOCH + 2, 2 * EPOCH + 2)  # steps in the second and third epoch
EVALUATED = (18, 36)


class Job(NamedTuple):
    """A submitted run: its job, its folder, what the submission printed."""

    id: str
    run: Path
    printed: str


def training_words(folder: Path, name: str, **fields: object) -> list[str]:
    """Return the command that submits a run of 36 steps in 3 epochs."""
    values = {
        "train_data": folder / "pairs" / "{00000..00003}.tar",
        "caption_keys": "txt",
        "train_num_samples": EPOCH * 16,
        "epochs": EPOCHS,
        "batch_size": 8,
        "ngpus": 2,
        "device": "cpu",
        "shuffle_buffer": 8,
        "log_steps": 1,
        "eval_steps": 0,
        "evals": folder / "online.yaml",
        "logs": folder / "logs",
        "name": name,
    } | fields
    words = [f"{field}={value}" for field, value in values.items()]
    return ["submitit_openclip.py", "llip_quickstart", *words, "--time", "10", "--cpus-per-task", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards, an evaluation set of 24 pictures in 3 classes, and the evaluation's files."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "pairs", 64)
    write_pairs(folder / "lost", 32)
    for index in range(24):
        target = folder / "pictures" / ("dog", "cat", "bird")[index % 3] / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image_bytes(index))
    entry = {"type": "imagefolder", "path": "pictures", "metric": "top1", "prompts": ["a {c}"], "classnames": "dataset"}
    (folder / "catalog.json").write_text(json.dumps({"pictures": entry}))
    common = f"eval_name: mc\ncatalog_name: {folder}/catalog.json\nworkers: 0\n"
    (folder / "online.yaml").write_text(common)
    checkpoint = folder / "logs" / "reference" / "checkpoints" / "latest.pt"
    own = f"mc_config_name: llip_quickstart\ncheckpoint_path: {checkpoint}\noutput_dir: {folder}/results\n"
    (folder / "final.yaml").write_text(common + own)
    return folder


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, checkout: Path, folder: Path) -> dict[str, Job]:
    """Submit three runs; break what one was submitted from, requeue it in its second epoch and warn it in its third."""

    def submit(name: str, *options: str, source: Path = ROOT, **fields: object) -> Job:
        job, printed = cluster.submit(*training_words(folder, name, **fields), *options, checkout=source)
        return Job(job, folder / "logs" / name, printed)

    start_server()
    lost = folder / "lost" / "{00000..00001}.tar"
    with ThreadPoolExecutor() as together:
        waiting = {
            "stopped": together.submit(submit, "stopped", source=checkout, eval_steps=EVALUATED[0]),
            "failing": together.submit(submit, "failing", train_data=lost, train_num_samples=32),
            "reference": together.submit(submit, "reference", "--eval-tasks", "0", eval_steps=EVALUATED[0]),
        }
        waiting["failing"].result()
        (folder / "lost" / "00001.tar").unlink()  # after the checks, before the job has started Python
        submitted = {name: job.result() for name, job in waiting.items()}
    main = checkout / "llip" / "main.py"
    main.write_text('raise RuntimeError("this code was edited after the submission")\n' + main.read_text())
    stopped = submitted["stopped"]
    stops = ("scontrol", "requeue", stopped.id), ("scancel", "--signal=USR2", stopped.id)
    for step, command in zip(STOP_AFTER, stops, strict=True):
        wait_until(lambda step=step: len(read_lines(stopped.run / "metrics.jsonl")) >= step, f"step {step}")
        assert cluster.job(stopped.id)["JobState"] == "RUNNING", cluster.last_words(stopped.run)
        done = cluster.command(*command)
        assert done.returncode == 0, done.stderr
    return submitted


def test_an_evaluation_job_gives_what_the_run_found_at_its_end(cluster: Cluster, jobs: dict[str, Job], folder: Path):
    cluster.wait_ended(jobs["reference"].id)
    words = ["-m", "evals.main_distributed", "--fname", str(folder / "final.yaml"), "--device", "cpu", "--ngpus", "2"]
    job, printed = cluster.submit(*words, "--time", "5", "--cpus-per-task", "1")
    assert cluster.wait_ended(job)["JobState"] == "COMPLETED", printed
    found = json.loads((folder / "results" / "results.json").read_text())["tasks"]["pictures"]
    assert found["n"] == 24
    assert found["value"] == read_lines(jobs["reference"].run / "evals.jsonl")[-1]["values"]["top1"]


def test_a_job_stopped_twice_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_happened(
    cluster: Cluster, jobs: dict[str, Job]
):
    assert cluster.wait_ended(jobs["reference"].id)["JobState"] == "COMPLETED"
    ended = cluster.wait_ended(jobs["stopped"].id)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2")
    log = (jobs["stopped"].run / "log.txt").read_text()
    steps = [int(step) for step in re.findall(rf"stopped as requested after step (\d+) of {STEPS}", log)]
    assert len(steps) == 2
    for epoch, after, step in zip((1, 2), STOP_AFTER, steps, strict=True):
        assert after <= step < (epoch + 1) * EPOCH
        assert f"resumed at step {step} of {STEPS}" in log
    expected = losses(jobs["reference"].run)
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert losses(jobs["stopped"].run) == expected  # to the last bit


def test_an_edit_after_the_submission_does_not_reach_the_job(cluster: Cluster, jobs: dict[str, Job], checkout: Path):
    again = cluster.command(sys.executable, "-m", "llip.main", "--list", cwd=checkout)
    assert "this code was edited after the submission" in again.stderr
    assert cluster.wait_ended(jobs["stopped"].id)["Restarts"] == "2"
    for log in (jobs["stopped"].run / "slurm").glob("*_log.*"):
        assert "this code was edited" not in log.read_text()


def test_online_evaluation_in_jobs_gives_what_the_run_itself_finds(cluster: Cluster, jobs: dict[str, Job]):
    cluster.wait_ended(jobs["stopped"].id)
    stopped, reference = jobs["stopped"].run, jobs["reference"].run
    wait_until(lambda: len(read_lines(stopped / "evals.jsonl")) == len(EVALUATED), "the evaluations")
    expected = read_lines(reference / "evals.jsonl")
    assert [line["step"] for line in expected] == list(EVALUATED)
    assert sorted(read_lines(stopped / "evals.jsonl"), key=lambda line: line["step"]) == expected
    wait_until(lambda: not any((stopped / "evaluating").iterdir()), "the end of the weights")
    assert "is evaluated by job" in (stopped / "log.txt").read_text()
    assert "is evaluated by job" not in (reference / "log.txt").read_text()


def test_a_failing_jobs_error_reaches_the_user(cluster: Cluster, jobs: dict[str, Job]):
    failing = jobs["failing"]
    ended = cluster.wait_ended(failing.id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    log = re.search(r"^logs: +(\S+)", failing.printed, re.MULTILINE)[1]
    message = "error: train_data: 1 of 2 shards are missing, the first is"
    assert message in Path(log).read_text()
    logs = [path.read_text() for path in (failing.run / "slurm").glob("*_log.*")]
    assert sum(text.count("shards are missing") for text in logs) == 1
    assert not any("Traceback" in text for text in logs)


def test_sbatch_takes_the_script_of_a_dry_run(cluster: Cluster, folder: Path, tmp_path: Path):
    dry = cluster.program(*training_words(folder, "dry"), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "#SBATCH --ntasks-per-node=2" in dry.stdout
    assert not (folder / "logs" / "dry").exists()
    script = tmp_path / "script.sh"
    script.write_text(dry.stdout)
    assert "to start at" in cluster.command("sbatch", "--test-only", str(script)).stderr


def test_slurm_is_not_started_twice_nor_where_one_is(cluster: Cluster, tmp_path: Path):
    script = Path(__file__).with_name("one_node.sh")
    elsewhere = cluster.environment | {"CI": "true"}
    done = subprocess.run(
        [script, "up", tmp_path], env=elsewhere, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "a cluster is set up already" in done.stderr
    assert list(tmp_path.iterdir()) == []
