"""Train a config on a SLURM cluster: `python submitit_openclip.py <config> [field=value ...] --partition gpu`.

Asks for the config's nodes, one task per GPU, and runs `llip.main` in each task; the run's folder holds SLURM's logs
under `slurm/`. The same command continues a run that was stopped.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from llip.configs import Config, search_config
from llip.errors import EXIT_USER, UserError


def parse(arguments: list[str]) -> tuple[Config, list[str], argparse.Namespace]:
    """Return (config, the words that llip.main is called with, SLURM options)."""
    parser = argparse.ArgumentParser(prog="python submitit_openclip.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="a config's name, or path/to/file.py:function")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the config")
    parser.add_argument("--partition", help="SLURM partition")
    parser.add_argument("--account", help="SLURM account")
    parser.add_argument("--qos", help="SLURM quality of service")
    parser.add_argument("--constraint", help="SLURM node constraint")
    parser.add_argument("--time", type=int, default=72 * 60, help="time limit in minutes [%(default)s]")
    parser.add_argument("--mem-gb", type=int, help="memory per node in GB; SLURM's default when left out")
    parser.add_argument("--cpus-per-task", type=int, help="[the config's workers + 2]")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script's settings and submit nothing")
    given = parser.parse_intermixed_args(arguments)
    return search_config(given.config, given.overrides), [given.config, *given.overrides], given


def slurm_parameters(config: Config, given: argparse.Namespace) -> dict[str, object]:
    """Return submitit's parameters for the job."""
    parameters: dict[str, object] = {
        "nodes": config.nodes,
        "ntasks_per_node": config.ngpus,
        "cpus_per_task": given.cpus_per_task or config.workers + 2,
        "time": given.time,
        "job_name": config.name,
    }
    if config.device != "cpu":
        parameters["gpus_per_node"] = config.ngpus
    for name in ("partition", "account", "qos", "constraint"):
        if getattr(given, name):
            parameters[name] = getattr(given, name)
    if given.mem_gb:
        parameters["mem"] = f"{given.mem_gb}GB"
    return parameters


class TrainTask:
    """What each SLURM task runs; picklable, so that a preempted job is submitted again as it was."""

    def __init__(self, arguments: list[str], folder: str) -> None:
        self.arguments, self.folder = arguments, folder

    def __call__(self) -> int:
        """Join the other tasks and train; raises when training fails, so that the job counts as failed."""
        import submitit

        from llip.main import main

        os.chdir(self.folder)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        code = main(self.arguments)
        if code:
            raise SystemExit(code)
        return code

    def checkpoint(self, *_: object) -> object:
        """Called by submitit on preemption: submit the same task again; it resumes from the run's folder."""
        import submitit

        return submitit.helpers.DelayedSubmission(TrainTask(self.arguments, self.folder))


def main(arguments: list[str] | None = None) -> int:
    """Submit the job and print where to look. Returns the exit code."""
    try:
        config, words, given = parse(sys.argv[1:] if arguments is None else arguments)
        parameters = slurm_parameters(config, given)
        logs = config.folder / "slurm"
        if given.dry_run:
            print("\n".join(f"{name}: {value}" for name, value in parameters.items()))
            print(f"logs: {logs}\ncommand of each task: python -m llip.main {' '.join(words)}")
            return 0
        if shutil.which("sbatch") is None:
            raise UserError("no sbatch on this machine: run this on a SLURM login node, or use python -m llip.main")
        import submitit

        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=1000)
        executor.update_parameters(**parameters)
        job = executor.submit(TrainTask(words, str(Path.cwd())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    print(f"job {job.job_id}: {config.processes} tasks; logs in {logs}, results in {config.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
