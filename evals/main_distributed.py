"""Evaluate as a SLURM job, one task per GPU: `python -m evals.main_distributed --fname config_evals/X.yaml --ngpus 8`.

`python -m evals.main_mc` evaluates on this machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import scaffold
from llip.clipeval.eval_config import find_eval_file
from llip.cluster.checks import check_evaluations, check_slurm
from llip.cluster.options import Shape, add_slurm_options, positive, sbatch_parameters, slurm_options
from llip.cluster.snapshot import commit_file, take_snapshot, use_snapshot
from llip.cluster.submit import JobRequest, command_line, counted, print_submitted
from llip.cluster.tasks import join_job
from llip.errors import UserError
from llip.system.program import program

PROGRAM = "python -m evals.main_distributed"
FROZEN = "submitted_evaluation.yaml"
"""Name of the evaluation file in a snapshot."""


class EvaluationProgram:
    """One task of a job that runs an evaluation file; picklable. A requeued job skips what it has evaluated."""

    def __init__(self, fname: str, folder: str, device: str) -> None:
        """Describe the task.

        Args:
            fname: the evaluation file. folder: where it was submitted, the base of relative paths in the file.
            device: cuda or cpu.
        """
        self.fname, self.folder, self.device = fname, folder, device

    def __call__(self) -> int:
        """Join the other tasks and evaluate; exits with the program's code unless it is 0."""
        from llip.training.distributed.launch import report_error

        os.chdir(self.folder)
        join_job()
        try:
            code = self._run()
        except UserError as error:
            code = report_error(error)
        if code:
            raise SystemExit(code)
        return code

    def _run(self) -> int:
        import torch

        from evals import mc
        from evals.devices import process_group

        config = scaffold.load(self.fname)
        count = int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_JOB_NUM_NODES"])
        devices = ["cpu"] * count
        if self.device != "cpu":
            if torch.cuda.device_count() < count:
                raise UserError(f"{count} tasks on this node, found {torch.cuda.device_count()} GPUs; each needs one")
            devices = [f"cuda:{index}" for index in range(count)]
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with process_group(self.device):
            return mc.run(config, devices)

    def checkpoint(self, *_: object) -> Any:
        """Return what submitit runs after a requeue: the same task."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(EvaluationProgram(self.fname, self.folder, self.device))

    __submitit_checkpoint__ = checkpoint


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of evals.main_distributed."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Evaluate a checkpoint zero-shot on a SLURM cluster, one task per GPU.",
        epilog="The results are those of llip eval; see docs/cluster.md.",
    )
    parser.add_argument("--fname", required=True, metavar="YAML", help="the evaluation, e.g. config_evals/X.yaml")
    parser.add_argument("--nodes", type=positive, default=1, help="machines [%(default)s]")
    parser.add_argument("--ngpus", type=positive, default=1, help="tasks per machine, with one GPU each [%(default)s]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tasks without GPUs")
    add_slurm_options(parser, cpus="the evaluation's workers + 2")
    return parser.parse_args(argv)


def submit(given: argparse.Namespace, argv: Sequence[str]) -> None:
    """Check and submit the evaluation and print where its logs are; with --dry-run, only print the script.

    Args:
        given: the result of `parse_arguments(argv)`.

    Raises:
        UserError: a missing or wrong evaluation file or checkpoint, contradicting options, or SLURM refuses the job.
    """
    from evals.models import find_weights_file  # imports torch: not for --dry-run

    config = scaffold.load(given.fname)
    if given.dry_run:
        print(job_request(given, write=False).script())
        return
    check_slurm()
    check_evaluations((given.fname,))
    find_weights_file(config)
    request = job_request(given)
    ids = request.submit()
    tasks = f"{counted(given.nodes * given.ngpus, 'task')} on {counted(given.nodes, 'node')}"
    what = f"{tasks}, results in {config.output_folder}"
    print_submitted(ids, request.logs, what, None, f"{command_line(PROGRAM, argv)}    (finished tasks are kept)")


def job_request(given: argparse.Namespace, write: bool = True) -> JobRequest:
    """Return the job; the code and the evaluation file are copied beside the results unless `write` is false.

    Raises:
        UserError: a missing or wrong evaluation file, options that contradict each other, an unwritable folder.
    """
    config, options = scaffold.load(given.fname), slurm_options(given)
    output = config.output_folder
    files = {FROZEN: find_eval_file(given.fname).read_text(encoding="utf-8"), **commit_file()}
    snapshot = take_snapshot(output / "code", files, output, write)
    shape = Shape(given.nodes, given.ngpus, config.workers + 2, given.device != "cpu")
    parameters = sbatch_parameters(options, shape, f"{Path(given.fname).stem}-eval", use_snapshot(snapshot))
    task = EvaluationProgram(str(snapshot / FROZEN), str(Path.cwd()), given.device)
    return JobRequest(output / "slurm", parameters, [task], options.max_timeouts)


@program
def main(arguments: Sequence[str]) -> None:
    """Submit an evaluation to SLURM."""
    submit(parse_arguments(arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
