"""Choose and start the processes of a run: one command for a laptop, a GPU box, torchrun and srun."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llip.configs import Config
from llip.errors import EXIT_RUN, EXIT_STOPPED, EXIT_USER, UserError
from llip.system.files import write_json
from llip.system.processes import Processes
from llip.training.distributed.exit_with_launcher import LAUNCHER
from llip.training.distributed.signals import STOP_SIGNALS, StopRequest
from llip.training.distributed.slurm_environment import joins_environment
from llip.training.distributed.watchdog import Watchdog, name_of_exit

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

REPORTS_FOLDER = "LLIP_REPORTS_FOLDER"
"""Environment variable: folder to which the processes started here write their errors, so that one is printed."""

_PROCESSES_PER_CORE = 4  # on the CPU; more is taken for a typing error


def _joined_processes() -> int | None:
    """Return how many processes the launcher started; None without one.

    Raises:
        UserError: its variables contradict each other.
    """
    if not joins_environment():
        return None
    values = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not all(value.isdecimal() for value in values.values()) or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        given = " ".join(f"{name}={value!r}" for name, value in values.items())
        raise UserError(f"environment {given}: expected numbers, RANK < WORLD_SIZE; unset them without a launcher")
    return int(values["WORLD_SIZE"])


def resolve_device(config: Config) -> str:
    """Return cuda or cpu for what the config asks for.

    Raises:
        UserError: it asks for more than this machine or the launcher has; names the overrides to use.
    """
    import torch

    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    joined = _joined_processes()
    if joined is not None and joined != config.processes:
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} = {config.processes} processes, and "
            f"the launcher started {joined}. {_smaller(config, 1, joined)}; nodes x ngpus must be {joined}"
        )
    if joined is None and config.nodes > 1:
        machine = f"{gpus} GPUs" if config.device != "cpu" else "CPUs"
        ngpus = max(1, gpus) if config.device != "cpu" else min(config.ngpus, _most_processes())
        raise UserError(
            f"config {config.name} asks for {config.nodes} nodes x {config.ngpus} GPUs, found one machine with "
            f"{machine} and no multi-node launch (submitit_openclip.py, srun or torchrun start one). "
            + _smaller(config, 1, ngpus, on_cpu=config.device != "cpu" and gpus == 0)
        )
    if config.device == "cpu" or (config.device == "auto" and gpus == 0 and config.ngpus == 1):
        if joined is None and config.ngpus > _most_processes():
            raise UserError(
                f"config {config.name} asks for {config.ngpus} processes on this machine, which has {os.cpu_count()} "
                f"cores (at most {_PROCESSES_PER_CORE} processes per core). "
                + _smaller(config, config.nodes, os.cpu_count() or 1)
            )
        return "cpu"
    if gpus < config.ngpus:
        raise UserError(
            f"config {config.name} asks for {config.ngpus} GPUs on this machine, found {gpus}. "
            + _smaller(config, config.nodes, max(1, gpus), on_cpu=gpus == 0)
        )
    return "cuda"


def _most_processes() -> int:
    return _PROCESSES_PER_CORE * (os.cpu_count() or 1)


def _smaller(config: Config, nodes: int, ngpus: int, on_cpu: bool = False) -> str:
    """Return a sentence with the overrides to use, their global batch, and the accum_freq that restores it."""
    overrides = f"nodes={nodes} ngpus={ngpus}" + (" device=cpu" if on_cpu else "")
    slices = config.batch_size * nodes * ngpus  # pairs per micro-batch
    batch = slices * config.accum_freq
    if batch == config.global_batch:
        return f"Use {overrides} (same global batch)"
    accum = max(1, round(config.global_batch / slices))
    effect = "restores it" if accum * slices == config.global_batch else f"gives {accum * slices:,}"
    return f"Use {overrides} (global batch {batch:,} instead of {config.global_batch:,}; accum_freq={accum} {effect})"


def start_processes(arguments: Sequence[str], config: Config) -> int:
    """Run the config's processes on this machine with PyTorch's elastic launcher, and return the exit code.

    No process is restarted: the first failure ends all, and one message reports it. A signal is passed on, so that the
    processes finish the step and save; a second Ctrl-C ends them at once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.subprocess_handler.subprocess_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # one message of ours instead
    later: dict[str, Any] = {  # PyTorch 2.9 lacks them and kills processes 30 s after SIGTERM
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
    signal.signal(signal.SIGUSR2, _pass_on)  # newer PyTorch replaces it with its own
    with tempfile.TemporaryDirectory(prefix="llip-") as folder:
        os.environ |= {REPORTS_FOLDER: folder, LAUNCHER: str(os.getpid())}
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are here
        try:
            elastic_launch(launch, sys.executable)("-m", "llip.main", *arguments)
        except ChildFailedError as failure:
            return _report_failure(_failures(Path(folder), failure))
        except SignalException as asked:
            return _report_stop(Path(folder), asked.sigval)
        finally:
            del os.environ[REPORTS_FOLDER], os.environ[LAUNCHER]
        return EXIT_STOPPED if _stopped(Path(folder)) else 0


def _pass_on(number: int, _: object) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"got signal {number}", sigval=signal.SIGTERM)


class RankFailure(NamedTuple):
    """Why a process of the run failed. The smallest one is closest to the cause."""

    kind: int  # one of _MISTAKE, _DEATH, _REPORT
    rank: int
    message: str
    code: int  # for the launcher to exit with


_MISTAKE, _DEATH, _REPORT = range(3)  # a user's; an end without a report; a report, often of another process's end


def _read_reports(folder: Path) -> list[RankFailure]:
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(RankFailure(_MISTAKE if each["code"] == EXIT_USER else _REPORT, **each) for each in reports)


def _failures(folder: Path, failure: "ChildFailedError") -> list[RankFailure]:
    """Return the failures of the run's processes, sorted, without those that follow from another one."""
    reports = _read_reports(folder)
    reported = {report.rank for report in reports}
    first, _ = failure.get_first_failure()
    if first in reported:  # the launcher then ended the others
        return reports
    deaths = [
        RankFailure(
            _DEATH, rank, f"process {rank} ended: {name_of_exit(end.exitcode)}", 1 if end.exitcode > 0 else EXIT_RUN
        )
        for rank, end in failure.failures.items()
        if rank not in reported and (rank == first or end.exitcode != -signal.SIGTERM)  # which the launcher sends
    ]
    return sorted([*reports, *deaths])


def _report_failure(failures: list[RankFailure]) -> int:
    """Print one message for all failures, and return the exit code."""
    deaths = [failure for failure in failures if failure.kind == _DEATH]
    others = [failure for failure in failures if failure.kind != _DEATH]
    chosen = others[:1] if failures[0].kind == _MISTAKE else deaths + others[:1]
    message = ". ".join(failure.message for failure in chosen)
    print(f"\nerror: {message}", file=sys.stderr)  # after an unfinished progress bar
    return max(failure.code for failure in chosen)


def _report_stop(folder: Path, number: signal.Signals) -> int:
    if reports := _read_reports(folder):
        return _report_failure(reports)
    return EXIT_STOPPED if _stopped(folder) else 128 + number


def _stopped(folder: Path) -> bool:
    return any(folder.glob("*.stopped"))


def exit_code(finished: bool) -> int:
    """Return the exit code of a process that has finished or stopped."""
    if finished:
        return 0
    folder = os.environ.get(REPORTS_FOLDER)
    if not folder:
        return EXIT_STOPPED
    (Path(folder) / f"{_rank():06}.stopped").touch()  # any code but 0 would make the launcher end the others
    return 0


def report_error(error: UserError) -> int:
    """Report an error, once however many processes raise it, and return the exit code."""
    folder = os.environ.get(REPORTS_FOLDER)
    if folder:  # the launcher prints it
        report = {"rank": _rank(), "message": str(error), "code": error.exit_code}
        write_json(Path(folder) / f"{_rank():06}.json", report)
    elif _rank() == 0 or not error.on_all_ranks:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


@contextlib.contextmanager
def watched(config: Config, processes: Processes, stop: StopRequest) -> Iterator[Watchdog]:
    """Run the block under a watchdog, which ends the process when a phase takes longer than `timeout_minutes`.

    Raises:
        RunError: another process died or does not answer; names it.
    """
    deadline = 60 * config.timeout_minutes
    watchdog = Watchdog(processes.rank, processes.world_size, processes.store, deadline, stop, report_error)
    try:
        with watchdog.explained():
            yield watchdog
    finally:
        watchdog.stop()
