"""Which processes a run has, and how they start: the same command on a laptop, a GPU box, torchrun and srun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llip.configs import Config
from llip.errors import EXIT_RUN, EXIT_STOPPED, EXIT_USER, CollectiveUserError, UserError
from llip.system.processes import Processes
from llip.training.distributed.exit_with_launcher import LAUNCHER
from llip.training.distributed.signals import STOP_SIGNALS
from llip.training.distributed.slurm_environment import join_step
from llip.training.distributed.watchdog import Watchdog, name_of_exit

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NOTES_FOLDER = "LLIP_NOTES_FOLDER"
"""Where the processes that this module starts leave what they have to tell, so that it is told once."""


def joins_environment() -> bool:
    """Tell whether torchrun, srun or our own launcher started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def adopt_slurm() -> None:
    """Under srun, describe this task's place in the variables that torchrun sets; elsewhere do nothing."""
    if "SLURM_PROCID" not in os.environ or joins_environment() or int(os.environ.get("SLURM_NTASKS", 1)) < 2:
        return
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return  # a batch script's own shell, not a task of a step
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    join_step(hosts.stdout.split()[0])


def resolve_device(config: Config) -> str:
    """Return cuda or cpu, having compared what the config asks for with what is here.

    Raises:
        UserError: more is asked for than there is, with the overrides to type and what they give.
    """
    import torch

    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    joined = int(os.environ["WORLD_SIZE"]) if joins_environment() else None
    if joined is not None and joined != config.processes:
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} = {config.processes} processes, and "
            f"the launcher started {joined}. {_restored(config, 1, joined)} (nodes x ngpus must be {joined})"
        )
    if joined is None and config.nodes > 1:
        found = f"{gpus} GPUs" if config.device != "cpu" else "CPUs"
        ngpus = max(1, gpus) if config.device != "cpu" else config.ngpus
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} GPUs, found one machine with {found} "
            "and no multi-node launch (submitit_openclip.py, srun or torchrun start one). "
            + _restored(config, 1, ngpus, on_cpu=config.device != "cpu" and gpus == 0)
        )
    if config.device == "cpu" or (config.device == "auto" and gpus == 0 and config.ngpus == 1):
        return "cpu"
    if gpus < config.ngpus:
        raise UserError(
            f"config {config.name} asks for {config.ngpus} GPUs on this machine, found {gpus}. "
            + _restored(config, config.nodes, max(1, gpus), on_cpu=gpus == 0)
        )
    return "cuda"


def _restored(config: Config, nodes: int, ngpus: int, on_cpu: bool = False) -> str:
    """Say what to type instead, the global batch that gives, and what restores the config's own."""
    overrides = f"nodes={nodes} ngpus={ngpus}" + (" device=cpu" if on_cpu else "")
    batch = config.batch_size * nodes * ngpus * config.accum_freq
    text = f"Type {overrides}: global batch {batch:,} in the place of {config.global_batch:,}"
    if batch != config.global_batch:
        accum = config.global_batch / (config.batch_size * nodes * ngpus)
        if accum == int(accum):
            text += f"; accum_freq={int(accum)} restores it"
        else:
            text += f"; accum_freq={round(accum)} gives {config.batch_size * nodes * ngpus * round(accum):,}"
    return text


def start_processes(arguments: list[str], config: Config) -> int:
    """Start the config's processes of `python -m llip.main` on this machine with PyTorch's elastic launcher and wait.

    No process is restarted: the first failure ends all. What goes wrong is told once. A signal is passed on, and the
    processes get as long as a step and a checkpoint may take to end in good order; Ctrl-C a second time ends them.

    Returns:
        The exit code.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.subprocess_handler.subprocess_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # we say it ourselves, once
    later = {  # not in the oldest PyTorch that is supported, which kills what has not left 30 s after SIGTERM
        "signals_to_handle": ",".join(number.name for number in STOP_SIGNALS),
        "shutdown_timeout": int(60 * config.timeout_minutes) + 60,
    }
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.ngpus,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        local_addr="127.0.0.1",  # the machine's name need not resolve
        max_restarts=0,
        monitor_interval=0.2,
        **{name: value for name, value in later.items() if name in LaunchConfig.__dataclass_fields__},
    )
    signal.signal(signal.SIGUSR2, _pass_on)  # a PyTorch that knows of more signals puts its own in this place
    with tempfile.TemporaryDirectory(prefix="llip-") as notes:
        os.environ |= {NOTES_FOLDER: notes, LAUNCHER: str(os.getpid())}
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are here
        try:
            elastic_launch(launch, sys.executable)("-m", "llip.main", *arguments)
        except ChildFailedError as failure:
            return _tell_failure(Path(notes), failure)
        except SignalException as asked:
            return _tell_stop(Path(notes), asked.sigval)
        finally:
            del os.environ[NOTES_FOLDER], os.environ[LAUNCHER]
        return EXIT_STOPPED if _stopped(Path(notes)) else 0


def _pass_on(number: int, _: object) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"got signal {number}", sigval=signal.SIGTERM)


def _tell_failure(notes: Path, failure: "ChildFailedError") -> int:
    """Say once why the run ended; what processes say of others is only news if nobody speaks for himself."""
    told = _told(notes)
    mistakes = [one for one in told if one["code"] == EXIT_USER]
    if mistakes:
        print(f"error: {mistakes[0]['message']}", file=sys.stderr)
        return EXIT_USER
    rank, first = failure.get_first_failure()
    speaks = {one["rank"] for one in told}
    ends = {rank: one for rank, one in sorted(failure.failures.items()) if rank not in speaks}
    died = {rank: one for rank, one in ends.items() if one.exitcode != -signal.SIGTERM} or {rank: first}
    if rank in speaks:
        died = {}
    lines = [f"process {rank} ended: {name_of_exit(one.exitcode)}" for rank, one in died.items()]
    lines += [one["message"] for one in told[:1]]
    print(f"\nerror: {'. '.join(lines) or 'see above'}", file=sys.stderr)  # a progress bar may have been left open
    return EXIT_RUN if told or any(one.exitcode < 0 for one in died.values()) else 1


def _tell_stop(notes: Path, number: signal.Signals) -> int:
    told = _told(notes)
    if told:
        print(f"error: {told[0]['message']}", file=sys.stderr)
        return told[0]["code"]
    return EXIT_STOPPED if _stopped(notes) else 128 + number


def _told(notes: Path) -> list[dict[str, Any]]:
    """Return what processes have left to tell, by rank: `rank`, `message`, `code`."""
    return [json.loads(path.read_text()) for path in sorted(notes.glob("*.json"))]


def _stopped(notes: Path) -> bool:
    return any(notes.glob("*.stopped"))


def exit_code(finished: bool) -> int:
    """Return the exit code of a process whose part of the run has ended in good order."""
    if finished:
        return 0
    notes = os.environ.get(NOTES_FOLDER)
    if not notes:
        return EXIT_STOPPED
    (Path(notes) / f"{_rank():06}.stopped").touch()  # another code than 0 would make the launcher end the others
    return 0


def report_error(error: UserError) -> int:
    """Tell an error once, however many processes make it, and return the exit code."""
    notes = os.environ.get(NOTES_FOLDER)
    if notes:  # the launcher tells
        path = Path(notes) / f"{_rank():06}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"rank": _rank(), "message": str(error), "code": error.exit_code}))
        partial.replace(path)
    elif _rank() == 0 or not isinstance(error, CollectiveUserError):
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def watched(config: Config, processes: Processes) -> Iterator[Watchdog]:
    """Watchdog this process inside: it ends when it does not move on within `timeout_minutes`.

    Raises:
        RunError: another process died or does not answer; names it.
    """
    deadline = 60 * config.timeout_minutes
    watch = Watchdog(processes.rank, processes.world_size, processes.store, deadline, report_error)
    try:
        with watch.explained():
            yield watch
    finally:
        watch.stop()
