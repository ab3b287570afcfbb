"""SLURM options of the command line, and the job parameters that follow from them."""

import argparse
import dataclasses
import re
from typing import Any

from llip.errors import UserError

MAX_TIMEOUTS = 1000
SIGNAL_MARGIN = 180
LAST_WORDS = 300
"""Seconds after the end of one task at which SLURM ends the others."""
_DAYS = 24 * 60


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """The options of one job, as SLURM names them.

    Attributes:
        time: limit in minutes. mem: memory per node in SLURM's form. gpus_per_node: `[type:]number`.
        signal_margin: seconds before the limit at which SLURM sends SIGUSR2.
        max_timeouts: how often the job is requeued after its limit or a preemption.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    job_name: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    gpus_per_node: str | None = None
    time: int = 3 * _DAYS
    signal_margin: int = SIGNAL_MARGIN
    max_timeouts: int = MAX_TIMEOUTS

    def __post_init__(self) -> None:
        if self.signal_margin >= 60 * self.time:
            raise UserError(
                f"--signal-margin {self.signal_margin}: expected less than the time limit of {60 * self.time} seconds"
            )


@dataclasses.dataclass(frozen=True)
class Shape:
    """The tasks of a job: `nodes` x `tasks`, each with `cpus`, and with one GPU where `gpu` is true."""

    nodes: int
    tasks: int
    cpus: int
    gpu: bool


def add_slurm_options(parser: argparse.ArgumentParser, cpus: str) -> None:
    """Add SLURM's options to a program; `cpus` is the default of --cpus-per-task, in words."""
    group = parser.add_argument_group("SLURM")
    for name, meaning in (
        ("partition", "partition to submit to"),
        ("account", "account that is charged"),
        ("qos", "quality of service"),
        ("constraint", "features that the nodes must have"),
        ("exclude", "nodes not to use"),
        ("comment", "a comment in the job's record"),
        ("job-name", "name of the job"),
    ):
        group.add_argument(f"--{name}", help=meaning)
    group.add_argument(
        "--time",
        type=time_limit,
        default=SlurmOptions.time,
        help="limit: minutes, H:MM:SS or D-HH:MM:SS; the job is requeued when it is reached [3 days]",
    )
    group.add_argument("--mem", type=_memory, help="memory per node, for instance 64G; 0: all of it [the cluster's]")
    group.add_argument("--cpus-per-task", type=positive, help=f"CPUs of each task [{cpus}]")
    group.add_argument(
        "--gpus-per-node",
        type=_gpus,
        help="[TYPE:]N, to name a type of GPU or to request more than are used; at least one per task",
    )
    group.add_argument(
        "--signal-margin",
        type=positive,
        default=SIGNAL_MARGIN,
        metavar="SECONDS",
        help="how long before the limit the job is signalled to save and requeue [%(default)s]",
    )
    group.add_argument(
        "--max-timeouts",
        type=positive,
        default=MAX_TIMEOUTS,
        metavar="N",
        help="how often the job is requeued after its limit; a preemption may count as one [%(default)s]",
    )
    group.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")


def slurm_options(given: argparse.Namespace) -> SlurmOptions:
    """Return the options of `add_slurm_options`.

    Raises:
        UserError: they contradict each other.
    """
    return SlurmOptions(**{field.name: getattr(given, field.name) for field in dataclasses.fields(SlurmOptions)})


def sbatch_parameters(options: SlurmOptions, shape: Shape, name: str, setup: list[str]) -> dict[str, Any]:
    """Return submitit's parameters of a job.

    Args:
        options: of the command line.
        shape: the tasks.
        name: the job's default name.
        setup: shell lines that run on the node before the tasks start.

    Raises:
        UserError: the requested GPUs contradict the tasks.
    """
    cpus = options.cpus_per_task or shape.cpus
    parameters: dict[str, Any] = {
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks,
        "cpus_per_task": cpus,
        "time": options.time,
        "job_name": options.job_name or name,
        "signal_delay_s": options.signal_margin,
        "setup": setup,
        # srun does not take the CPUs from sbatch since SLURM 22.05. After the end of a task the others have time to
        # report it, and to exit with their own code
        "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=0", f"--wait={LAST_WORDS}"],
        "additional_parameters": {"requeue": True},
    }
    if shape.gpu:
        parameters["gpus_per_node"] = _gpus_of(options, shape)
    elif options.gpus_per_node:
        raise UserError(f"--gpus-per-node {options.gpus_per_node}: the job runs on CPUs (device=cpu); leave it out")
    given = ("partition", "account", "qos", "constraint", "exclude", "comment", "mem")
    return parameters | {key: getattr(options, key) for key in given if getattr(options, key)}


def _gpus_of(options: SlurmOptions, shape: Shape) -> str:
    gpus = options.gpus_per_node or str(shape.tasks)
    if int(gpus.rpartition(":")[2]) < shape.tasks:
        raise UserError(
            f"--gpus-per-node {gpus}: there are {shape.tasks} tasks per node with one GPU each; ask for at least "
            f"{shape.tasks}, or give ngpus={gpus.rpartition(':')[2]} and more nodes or a larger accum_freq"
        )
    return gpus


def time_limit(text: str) -> int:
    """Read a time limit in one of SLURM's forms and return minutes, rounded up.

    Raises:
        argparse.ArgumentTypeError: another form, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, MM:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    days, *rest = match.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:
        seconds = 86_400 * int(days) + 3600 * first + 60 * second + third
    elif rest[2] is not None:
        seconds = 3600 * first + 60 * second + third
    else:
        seconds = 60 * first + second
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r}: expected more than 0")
    return -(-seconds // 60)


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]?B?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with a unit, for instance 64G or 500M")
    return text


def _gpus(text: str) -> str:
    if not re.fullmatch(r"(?:[\w.-]+:)?[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or TYPE:NUMBER, for instance a100:8")
    return text


def positive(text: str) -> int:
    """Read an integer that is at least 1.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, at least 1")
    return int(text)
