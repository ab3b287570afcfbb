"""SLURM's options: the forms that sbatch reads, and requests that contradict the config."""

import argparse

import pytest

from llip.cluster.options import Shape, SlurmOptions, add_slurm_options, sbatch_parameters, slurm_options, time_limit
from llip.errors import UserError

GPUS = Shape(nodes=2, tasks=8, cpus=6, gpu=True)


def options(*words: str) -> SlurmOptions:
    parser = argparse.ArgumentParser()
    add_slurm_options(parser, cpus="some")
    return slurm_options(parser.parse_args(words))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("1:30", 2),  # a minute and a half, rounded up
        ("2:00:00", 120),
        ("0:00:01", 1),
        ("1-12", 36 * 60),
        ("2-01:30", 48 * 60 + 90),
        ("1-00:00:30", 24 * 60 + 1),
    ],
)
def test_time_limits_as_sbatch_documents_them(text, minutes):
    assert time_limit(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "-5", "1:2:3:4", "0", "0:00", "1-"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        time_limit(text)


@pytest.mark.parametrize(
    "words",
    [("--mem", "much"), ("--gpus-per-node", "0"), ("--gpus-per-node", "a100"), ("--signal-margin", "0"),
     ("--cpus-per-task", "two"), ("--max-timeouts", "-1")],
)  # fmt: skip
def test_values_that_slurm_would_not_read_are_refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        options(*words)
    assert left.value.code == 2
    assert repr(words[1]) in capsys.readouterr().err


def test_a_margin_longer_than_the_limit_is_refused():
    with pytest.raises(UserError, match=r"--signal-margin 120.*60 seconds"):
        options("--time", "1", "--signal-margin", "120")


def test_every_option_comes_to_the_script():
    words = "--partition gpu --account lab --qos high --constraint a100 --exclude n1,n2 --comment hello --mem 64G"
    given = options(*words.split(), "--time", "1-0", "--signal-margin", "600", "--job-name", "mine")
    parameters = sbatch_parameters(given, GPUS, "config", ["true"])
    expected = {
        "nodes": 2, "ntasks_per_node": 8, "cpus_per_task": 6, "gpus_per_node": "8", "time": 1440, "mem": "64G",
        "partition": "gpu", "account": "lab", "qos": "high", "constraint": "a100", "exclude": "n1,n2",
        "comment": "hello", "job_name": "mine", "signal_delay_s": 600,
    }  # fmt: skip
    assert {name: parameters[name] for name in expected} == expected
    assert parameters["additional_parameters"] == {"requeue": True}
    assert "--cpus-per-task=6" in parameters["srun_args"]


def test_what_is_not_given_is_left_to_the_cluster():
    parameters = sbatch_parameters(options(), Shape(1, 2, 3, gpu=False), "config", [])
    assert not parameters.keys() & {"partition", "account", "qos", "constraint", "exclude", "mem", "gpus_per_node"}
    assert parameters["job_name"] == "config"


def test_gpus_may_be_more_than_the_tasks_and_never_fewer():
    assert sbatch_parameters(options("--gpus-per-node", "h100:8"), GPUS, "c", [])["gpus_per_node"] == "h100:8"
    with pytest.raises(UserError, match=r"--gpus-per-node h100:4: there are 8 tasks per node"):
        sbatch_parameters(options("--gpus-per-node", "h100:4"), GPUS, "c", [])
    with pytest.raises(UserError, match="runs on CPUs"):
        sbatch_parameters(options("--gpus-per-node", "1"), Shape(1, 2, 3, gpu=False), "c", [])
