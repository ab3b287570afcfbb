"""Zero-shot evaluation during training, through clipeval's one function: in the run's processes or in jobs of its own.

A run that `submitit_openclip.py` has submitted leaves it to jobs, see `llip.cluster.pending`; others do it themselves.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable

from llip.clipeval.online import evaluate_online, load_online_eval
from llip.clipeval.task_result import TaskResult
from llip.cluster.tasks import EVALUATION_JOBS
from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import image_transforms, model_spec, spec_tokenizer
from llip.open_clip.model import Llip, autocast_dtype
from llip.system.processes import Processes
from llip.training.checkpoints.records import EVALS
from llip.training.reporting.run_log import RunLog, log
from llip.training.trainer import Evaluate


def online_evaluation(config: Config, run_log: RunLog, processes: Processes) -> Evaluate | None:
    """Return what evaluates a model by the config's evaluation YAMLs and records the results; None when it is off.

    Every process must call it: each works on its share of the images, or the main one submits the job.

    Raises:
        UserError: a YAML or a catalog is missing or wrong.
    """
    if not config.eval_steps or not config.evals:
        return None
    online = [load_online_eval(path) for path in config.evals]
    options = os.environ.get(EVALUATION_JOBS)
    if options is not None:
        return _by_jobs(config, {task for one in online for task in one.tasks}, run_log, processes, options)
    spec = model_spec(config)
    _, preprocess = image_transforms(spec.image_size, spec.resize_mode)
    tokenizer = spec_tokenizer(spec)
    dtype = autocast_dtype(config.precision)

    def evaluate(model: Llip, step: int, stopping: Callable[[], bool]) -> None:
        done = processes.broadcast_object(run_log.evaluated_tasks(step))
        single = [dataclasses.replace(each, tasks=(task,)) for each in online for task in each.tasks]
        for one in single:
            if one.tasks[0] in done:
                continue
            if stopping():
                log.info("step %d: the evaluation is left off, and made up when the run goes on", step)
                return
            for result in evaluate_online(model, preprocess, tokenizer, one, processes.device, dtype):
                if report_result(result, step):
                    run_log.evaluation(step, result.task, result.values)

    return evaluate


def report_result(result: TaskResult, step: int) -> bool:
    """Log a result, and return whether there is one to record."""
    if result.error:
        log.warning("step %d, %s: %s", step, result.task, result.error)
        return False
    words = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.values.items())
    log.info("step %d, %s: %s", step, result.task, words)
    return True


def _by_jobs(config: Config, tasks: set[str], run_log: RunLog, processes: Processes, options: str) -> Evaluate:
    """Return what submits evaluations from the main process; what goes wrong is a warning, and training goes on."""
    from llip.cluster.evaluation import submit_evaluation
    from llip.cluster.pending import save_for_eval

    def evaluate(model: Llip, step: int, stopping: Callable[[], bool]) -> None:
        if not processes.is_main or tasks <= run_log.evaluated_tasks(step):
            return
        weights = None
        try:
            weights = save_for_eval(config.folder, model, step)
            job = submit_evaluation(options, config, weights)
            log.info("step %d is evaluated by job %s; results come to %s", step, job, config.folder / EVALS)
        except (UserError, OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            log.warning("step %d is not evaluated: %s", step, error)
            if weights is not None:
                with contextlib.suppress(OSError):
                    weights.unlink(missing_ok=True)

    return evaluate
