"""Online evaluation as jobs of its own: the training job submits one for each step to be evaluated, and trains on."""

import json
import os
from pathlib import Path
from typing import Any

from llip.cluster.submit import JobRequest
from llip.cluster.tasks import join_job
from llip.configs import Config, own_files, read_file
from llip.errors import UserError


class EvaluationTask:
    """Evaluates weights that a run has put aside, as one task of a job; picklable."""

    def __init__(self, config: Config, weights: Path, folder: str, own: list[str]) -> None:
        """Describe the task.

        Args:
            config: the run's, with the nodes and ngpus of the evaluation's job.
            weights: the file. folder: where the run's relative paths belong.
            own: files of the user's that register what the config names.
        """
        self.config, self.weights, self.folder, self.own = config, weights, folder, own

    def __call__(self) -> int:
        """Join the other tasks and evaluate; leaves with a code other than 0 when something could not be evaluated."""
        from llip.cluster.pending import evaluate_saved
        from llip.training.distributed.launch import report_error

        os.chdir(self.folder)
        try:
            for path in self.own:
                read_file(Path(path))
        except UserError as error:
            raise SystemExit(report_error(error)) from error
        join_job()
        code = evaluate_saved(self.config, self.weights)
        if code:
            raise SystemExit(code)
        return code

    def checkpoint(self, *_: object) -> Any:
        """Called by submitit when the job is queued again: the same task, from the beginning."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(EvaluationTask(self.config, self.weights, self.folder, self.own))

    __submitit_checkpoint__ = checkpoint


def submit_evaluation(options: str, config: Config, weights: Path) -> str:
    """Submit the job that evaluates `weights`, from within the training job, and return its id.

    Args:
        options: the json that the training job carries, see `tasks.EVALUATION_JOBS`.
        config: the run's.
        weights: the file that the job evaluates and removes.

    Raises:
        UserError: SLURM does not take the job.
    """
    asked = json.loads(options)
    parameters = asked["parameters"]
    shaped = config.replace(nodes=parameters["nodes"], ngpus=parameters["ntasks_per_node"])
    own = [str(path) for path in own_files(config)]
    task = EvaluationTask(shaped, weights.absolute(), str(Path.cwd()), own)
    request = JobRequest(Path(asked["logs"]), parameters, [task], asked["max_timeouts"])
    return request.submit()[0]
