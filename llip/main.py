"""Train one config: `python -m llip.main <config> [field=value ...]`.

The same command starts a run and resumes it; a finished run does nothing. On one machine it starts the processes that
the config asks for; under torchrun or srun it joins them.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llip.cli import parse_command
from llip.configs import Config
from llip.errors import UserError
from llip.system.program import program
from llip.training.distributed.exit_with_launcher import exit_with_launcher

if TYPE_CHECKING:
    from llip.training.evaluation import SubmitEvaluation
    from llip.training.reporting.step_log import StepResult


@program
def main(arguments: Sequence[str], submit_evaluation: "SubmitEvaluation | None" = None) -> int:
    """Resolve the config, start or join its processes, train; return the exit code.

    Args:
        arguments: the command line.
        submit_evaluation: submits online evaluations to other jobs, from a process that joins others in a SLURM job.
    """
    exit_with_launcher()
    command = parse_command(arguments)
    if command.config is None:
        return 0
    if command.print_only:
        from llip.training.checkpoints.run_folder import config_yaml

        print(config_yaml(command.config), end="")
        return 0
    return launch(command.config, arguments, submit_evaluation)


def launch(config: Config, arguments: Sequence[str], submit_evaluation: "SubmitEvaluation | None" = None) -> int:
    """Run this process's part of the config, or start the processes that do."""
    from llip.training.distributed import launch
    from llip.training.distributed.slurm_environment import adopt_slurm, joins_environment

    try:
        adopt_slurm()
        device = launch.resolve_device(config)
        if joins_environment() or config.ngpus == 1:
            return launch.exit_code(train(config, device, submit_evaluation))
        return launch.start_processes(arguments, config)
    except UserError as error:
        return launch.report_error(error)


def train(
    config: Config,
    device: str,
    submit_evaluation: "SubmitEvaluation | None" = None,
    on_step: "Callable[[StepResult], None] | None" = None,
) -> bool:
    """Train as one process of the run: join the others, build or restore, fit.

    Args:
        config: the run's config.
        device: cuda or cpu.
        submit_evaluation: see `main`.
        on_step: called at the end of each step.

    Returns:
        Whether the run is finished.
    """
    from llip.training.checkpoints.saver import Saver
    from llip.training.distributed.launch import watched
    from llip.training.distributed.processes import join_processes
    from llip.training.distributed.signals import stop_on_signals
    from llip.training.evaluation import online_evaluation
    from llip.training.reporting.figures import draw_curves
    from llip.training.reporting.run_log import log
    from llip.training.setup import build_run, check_data, open_folder
    from llip.training.trainer import Outcome, Trainer

    with (
        stop_on_signals() as stop,
        join_processes(config, device) as processes,
        watched(config, processes, stop) as watch,
        open_folder(config, processes),
    ):
        data = check_data(config, processes)
        run = build_run(config, data, processes)
        evaluate = online_evaluation(config, run.run_log, processes, submit_evaluation)
        saver = Saver(config, run.task.model, run.state, processes, run.provenance)
        trainer = Trainer(config, run.task, run.state, processes, run.run_log, saver, watch, stop, evaluate, on_step)
        nothing_to_do = run.state.step >= config.total_steps
        finished = trainer.fit(run.loader) is Outcome.FINISHED
        run.run_log.close()
        if processes.is_main and finished:
            already = " already: nothing to do" if nothing_to_do else ""
            log.info("finished%s: %s", already, config.folder)
            draw_curves(config.folder)
        processes.barrier()  # no process exits before the checkpoint is written
        return finished


if __name__ == "__main__":
    sys.exit(main())
