"""Zero-shot evaluation during training: in the run's own processes, or handed to whoever submits it as a job."""

from collections.abc import Callable

from llip.clipeval.catalog.catalog import load_evaluation
from llip.clipeval.evaluate import evaluate_tasks
from llip.clipeval.task_result import TaskResult
from llip.configs import Config
from llip.open_clip.factory import model_spec, spec_tokenizer
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.transforms import image_transforms
from llip.system.processes import Processes
from llip.training.reporting.run_log import RunLog, log
from llip.training.trainer import Evaluate

SubmitEvaluation = Callable[[Config, Llip, int], None]
"""Submits the evaluation of a run's model after a step to another job; called on the main process alone."""


def online_evaluation(
    config: Config, run_log: RunLog, processes: Processes, submit: SubmitEvaluation | None = None
) -> Evaluate | None:
    """Return a function that evaluates a model by the config's evaluation YAMLs and records the results.

    Args:
        config: the run; None is returned if it has no `eval_steps` or no `evals`.
        run_log: takes the results.
        processes: of the run; each evaluates its share of the images.
        submit: evaluates in another job instead, which records the results itself.

    Raises:
        UserError: a YAML or a catalog is missing or wrong.
    """
    if not config.eval_steps or not config.evals:
        return None
    tasks = [(evaluation, entry) for evaluation, entries in map(load_evaluation, config.evals) for entry in entries]
    spec = model_spec(config)
    _, preprocess = image_transforms(spec.image_size, spec.resize_mode)
    tokenizer = spec_tokenizer(spec)
    dtype = autocast_dtype(config.precision)

    def evaluate(model: Llip, step: int, stopping: Callable[[], bool]) -> bool:
        done = run_log.evaluated_tasks(step)
        if submit is not None:
            if processes.is_main and any(entry.name not in done for _, entry in tasks):
                submit(config, model, step)
            return True
        done = processes.broadcast_object(done)
        for evaluation, entry in tasks:
            if entry.name in done:
                continue
            if stopping():
                log.info("step %d: evaluation skipped; it will run on resume", step)
                return False
            (result,) = evaluate_tasks(
                model,
                [entry],
                evaluation,
                device=processes.device,
                preprocess=preprocess,
                tokenizer=tokenizer,
                autocast_dtype=dtype,
            )
            if report_result(result, step):
                run_log.evaluation(step, result.task, result.values)
        return True

    return evaluate


def report_result(result: TaskResult, step: int) -> bool:
    """Log a result; return whether it has values to record."""
    if result.error:
        log.warning("step %d, %s: %s", step, result.task, result.error)
        return False
    values = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.values.items())
    log.info("step %d, %s: %s", step, result.task, values)
    return True
