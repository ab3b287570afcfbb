"""Online evaluation in jobs that the training job submits, one for each evaluated step. Imports no torch."""

import contextlib
import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llip.cluster.submit import JobRequest
from llip.cluster.tasks import JobTask, join_job
from llip.configs import Config
from llip.errors import UserError
from llip.training.checkpoints.records import EVALS

if TYPE_CHECKING:
    from llip.open_clip.model import Llip

log = logging.getLogger("llip")


@dataclasses.dataclass(frozen=True)
class EvaluationTask(JobTask):
    """Evaluates weights that a run has saved for it.

    Attributes:
        config: the run's, with the nodes and ngpus of the evaluation's job.
        weights: the file.
        folder: to which the run's relative paths belong.
    """

    config: Config
    weights: Path
    folder: str

    def __call__(self) -> int:
        """Join the other tasks and evaluate; exit with a code other than 0 where something could not be evaluated."""
        from llip.cluster.pending import evaluate_saved

        os.chdir(self.folder)
        join_job()
        code = evaluate_saved(self.config, self.weights)
        if code:
            raise SystemExit(code)
        return code


@dataclasses.dataclass(frozen=True)
class EvaluationJobs:
    """Submits evaluation jobs from within a training job; `llip.main.main` takes it as `submit_evaluation`."""

    logs: Path
    parameters: dict[str, Any]  # sbatch's
    max_timeouts: int

    def __call__(self, config: Config, model: "Llip", step: int) -> None:
        """Save the model and submit the job that evaluates it; a failure is a warning."""
        from llip.cluster.pending import save_for_eval

        weights = None
        try:
            weights = save_for_eval(config.folder, model, step)
            job = self.submit(config, weights)
            log.info("step %d is evaluated by job %s; results go to %s", step, job, config.folder / EVALS)
        except (UserError, OSError) as error:
            log.warning("step %d is not evaluated: %s", step, error)
            if weights is not None:
                with contextlib.suppress(OSError):
                    weights.unlink(missing_ok=True)

    def submit(self, config: Config, weights: Path) -> str:
        """Submit the job that evaluates and removes the file `weights`; return its id.

        Raises:
            UserError: SLURM refuses the job.
        """
        shaped = config.replace(nodes=self.parameters["nodes"], ngpus=self.parameters["ntasks_per_node"])
        task = EvaluationTask(shaped, weights.absolute(), str(Path.cwd()))
        return JobRequest(self.logs, self.parameters, [task], self.max_timeouts).submit()[0]
