"""Submit a training command as a job, or as an array of jobs over seeds."""

import argparse
import dataclasses
from pathlib import Path

from llip.cluster.checks import check_folder, check_slurm, check_training
from llip.cluster.evaluation import EvaluationJobs
from llip.cluster.options import (
    Shape,
    SlurmOptions,
    add_slurm_options,
    positive,
    sbatch_parameters,
    slurm_options,
    time_limit,
)
from llip.cluster.snapshot import commit_file, copies_of_extensions, frozen_config, take_snapshot, use_snapshot
from llip.cluster.submit import JobRequest, command_line, counted, print_notes, print_submitted
from llip.cluster.tasks import TrainTask
from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError

PROGRAM = "python submitit_openclip.py"
FROZEN = "submitted_config.py"
"""The file of a snapshot that holds the config."""


@dataclasses.dataclass(frozen=True)
class TrainingCommand:
    """A parsed command.

    Attributes:
        arguments: the command line.
        function: the config function's name.
        config: resolved with the overrides.
        options: SLURM's.
        seeds: runs of the array; None: a single run.
        eval_tasks: tasks of an online evaluation's job; 0: evaluate inside the training job.
        eval_time: limit of an evaluation's job in minutes.
        dry_run: only print the script.
    """

    arguments: list[str]
    function: str
    config: Config
    options: SlurmOptions
    seeds: int | None
    eval_tasks: int
    eval_time: int
    dry_run: bool

    def runs(self) -> list[Config]:
        """Return the config of every run; in an array they differ in seed and name."""
        if self.seeds is None:
            return [self.config]
        first, name = self.config.seed, self.config.name
        return [self.config.replace(seed=seed, name=f"{name}-seed{seed}") for seed in range(first, first + self.seeds)]


def parse_training(arguments: list[str]) -> TrainingCommand:
    """Read the command line of submitit_openclip.py.

    Raises:
        UserError: an unknown config or field, a wrong value, or SLURM options that contradict each other.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train a config on a SLURM cluster, on the nodes and GPUs that it asks for, one task per GPU.",
        epilog="The same command continues a run that was stopped. See docs/cluster.md.",
    )
    parser.add_argument("config", help="a config's name, or path/to/file.py:function")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument(
        "--array-seeds",
        type=positive,
        metavar="N",
        help="a job array of N runs with seed, seed+1, ...; run k is called <name>-seed<k>",
    )
    parser.add_argument(
        "--eval-tasks",
        type=int,
        default=1,
        metavar="N",
        help="tasks, with one GPU each, of the jobs that evaluate during training (eval_steps, evals); 0: the training "
        "job stops to evaluate itself [%(default)s]",
    )
    parser.add_argument(
        "--eval-time", type=time_limit, default=4 * 60, metavar="TIME", help="time limit of those jobs [4:00:00]"
    )
    add_slurm_options(parser, cpus="the config's workers + 2")
    given = parser.parse_intermixed_args(arguments)
    if given.eval_tasks < 0:
        raise UserError(f"--eval-tasks {given.eval_tasks}: expected 0 or more")
    return TrainingCommand(
        arguments,
        given.config.rpartition(":")[2],
        search_config(given.config, given.overrides),
        slurm_options(given),
        given.array_seeds,
        given.eval_tasks,
        given.eval_time,
        given.dry_run,
    )


def submit_training(command: TrainingCommand) -> None:
    """Check the request, submit the job, and print how to follow it; or print the script.

    Raises:
        UserError: the run would stop at a mistake, or SLURM refuses the job.
    """
    script = training_request(command, write=False).script()
    if command.dry_run:
        print(script)
        try:
            print_notes(check_training(command.config))
        except UserError as problem:
            print_notes([f"the submission would fail: {problem}"])
        return
    check_slurm()
    print_notes(check_training(command.config))
    for run in command.runs():
        print_notes(check_folder(run.folder))
    request = training_request(command)
    ids = request.submit()
    config, runs = command.config, command.runs()
    tasks = f"{counted(config.processes, 'task')} on {counted(config.nodes, 'node')}"
    what = f"{tasks}, run folder {config.folder}"
    if len(runs) > 1:
        what = f"an array of {len(runs)} runs, {tasks} each, run folders {runs[0].folder} ... {runs[-1].folder}"
    again = f"{command_line(PROGRAM, command.arguments)}    (once the job has ended)"
    print_submitted(ids, request.logs, what, runs[0].folder / "log.txt", again)


def training_request(command: TrainingCommand, write: bool = True) -> JobRequest:
    """Return the job of a command; its code is copied to the run's folder unless `write` is false.

    Raises:
        UserError: options that contradict the config, or a file of the user's that cannot be copied.
    """
    config, runs = command.config, command.runs()
    files = {FROZEN: frozen_config(config, command.function), **copies_of_extensions(config), **commit_file()}
    snapshot = take_snapshot(config.folder / "code", files, Path(config.logs), write)
    setup = use_snapshot(snapshot)
    shape = Shape(config.nodes, config.ngpus, config.workers + 2, config.device != "cpu")
    logs = config.folder / "slurm"
    evaluation = _evaluation_jobs(command, logs, setup)
    tasks = []
    for run in runs:
        changes = [] if run is config else [f"seed={run.seed}", f"name={run.name}"]
        words = [f"{snapshot / FROZEN}:{command.function}", *changes]
        tasks.append(TrainTask(words, str(Path.cwd()), evaluation))
    parameters = sbatch_parameters(command.options, shape, config.name, setup)
    return JobRequest(logs, parameters, tasks, command.options.max_timeouts)


def _evaluation_jobs(command: TrainingCommand, logs: Path, setup: list[str]) -> EvaluationJobs | None:
    """Return what submits the run's evaluation jobs; None without evaluation, or where the training job evaluates."""
    config = command.config
    if not (config.eval_steps and config.evals and command.eval_tasks):
        return None
    options = dataclasses.replace(command.options, time=command.eval_time, gpus_per_node=None)
    shape = Shape(1, command.eval_tasks, config.workers + 2, config.device != "cpu")
    options = dataclasses.replace(options, job_name=f"{options.job_name or config.name}-eval")
    parameters = sbatch_parameters(options, shape, config.name, setup)
    return EvaluationJobs(logs.absolute(), parameters, options.max_timeouts)
