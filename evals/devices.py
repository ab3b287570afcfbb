"""The processes of an evaluation: one per device, on this machine or as the tasks of a SLURM job."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llip.errors import RunError, UserError
from llip.system.cores import usable_cores
from llip.system.exit_with_parent import serve_parent
from llip.system.files import write_text
from llip.system.processes import GROUP_TIMEOUT
from llip.training.distributed.watchdog import name_of_exit

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL for processes that remain


class ProcessKilledError(RunError):
    """A signal killed one of the processes before it could report anything."""


def choose_devices(names: Sequence[str] | None) -> list[str]:
    """Return the devices to use: `names`, else all CUDA devices, else one cpu.

    Raises:
        UserError: an unknown or absent device, a GPU that is named twice, or a mix of cpu and cuda.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not names:
        return gpus or ["cpu"]
    names = ["cuda:0" if name == "cuda" else name for name in names]
    for name in names:
        if name != "cpu" and name not in gpus:
            raise _unknown_device(name, gpus)
        if name != "cpu" and names.count(name) > 1:
            raise UserError(f"--devices names {name} more than once; expected one process per GPU")
    if "cpu" in names and set(names) != {"cpu"}:
        raise UserError(f"--devices {' '.join(names)}: expected either cpu or cuda devices, not both")
    return list(names)


def _unknown_device(name: str, gpus: list[str]) -> UserError:
    if "," in name:
        return UserError(f"--devices {name}: separate devices by spaces: --devices {' '.join(name.split(','))}")
    spelled = f"cuda:{name}" if name.isdecimal() else name.lower()
    if spelled in ("cpu", *gpus):
        return UserError(f"--devices {name}: no such device. Did you mean {spelled!r}?")
    if not gpus:
        return UserError(
            f"--devices {name}: this machine has no CUDA device; write --devices cpu (twice: two processes)"
        )
    here = ", ".join(["cpu", *gpus])
    return UserError(f"--devices {name}: this machine has {here}; for instance --devices {' '.join(gpus)}")


def launch(worker: Callable[..., None], devices: Sequence[str], *args: Any) -> None:
    """Run `worker(device, *args)` on each device: in this process if there is one, else in a group of new processes.

    Inside a process group (a task of a SLURM job), run it on this process's device of `devices`.

    Args:
        worker: an importable function; with several devices its arguments must pickle.

    Raises:
        UserError: from a worker. ProcessKilledError: a signal killed a worker. RuntimeError: another exception in one.
    """
    if dist.is_initialized() or len(devices) == 1:
        device = devices[int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0]
        _use_device(device)
        worker(device, *args)
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="llip-evals-") as folder:
        children = [
            context.Process(target=_child, args=(rank, worker, list(devices), args, folder))
            for rank in range(len(devices))
        ]
        try:
            for child in children:
                child.start()
            while not any(child.exitcode for child in children) and (running := _running(children)):
                wait([child.sentinel for child in running])
            _raise_failure(children, devices, Path(folder))
        finally:
            _end(children)


@contextlib.contextmanager
def process_group(device: str, **rendezvous: Any) -> Iterator[None]:
    """Join the process group that the environment or `rendezvous` describes, and leave it at the end of the block."""
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=GROUP_TIMEOUT, **rendezvous)
    try:
        yield
    except UserError:
        if device == "cpu":  # gloo's threads abort a process that exits with them; NCCL may wait for lost processes
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _child(rank: int, worker: Callable[..., None], devices: list[str], args: tuple, folder: str) -> None:
    serve_parent()
    device = devices[rank]
    _use_device(device)
    if device == "cpu":
        torch.set_num_threads(max(1, usable_cores() // len(devices)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are here; host names need not resolve
    try:
        with process_group(device, init_method=f"file://{folder}/group", rank=rank, world_size=len(devices)):
            worker(device, *args)
    except Exception as error:
        kind, text, code = "failure", traceback.format_exc(), 1
        if isinstance(error, UserError):
            kind, text, code = "mistake", str(error), error.exit_code
        write_text(Path(folder, f"{kind}_{time.monotonic_ns():020}_{rank}.txt"), text)
        sys.stdout.flush()
        os._exit(code)  # the others may wait in a collective; the parent ends them


def _use_device(device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)


def _running(children: Sequence[BaseProcess]) -> list[BaseProcess]:
    return [child for child in children if child.exitcode is None]


def _raise_failure(children: Sequence[BaseProcess], devices: Sequence[str], folder: Path) -> None:
    """Raise what ended a process: a user's mistake, else a signal, else the first exception, the others' cause."""
    for report in sorted(folder.glob("mistake_*.txt")):
        raise UserError(report.read_text(encoding="utf-8"))
    for rank, child in enumerate(children):
        if child.exitcode is not None and child.exitcode < 0:
            raise ProcessKilledError(f"process {rank} ({devices[rank]}) was {name_of_exit(child.exitcode)}")
    for report in sorted(folder.glob("failure_*.txt")):
        raise RuntimeError(f"an evaluation process failed:\n{report.read_text(encoding='utf-8')}")
    for rank, child in enumerate(children):
        if child.exitcode:
            raise RuntimeError(f"process {rank} ({devices[rank]}) ended with {name_of_exit(child.exitcode)}")


def _end(children: Sequence[BaseProcess]) -> None:
    """Terminate the processes that still run, and kill those that do not end in time."""
    running = [child for child in children if child.is_alive()]
    for child in running:
        child.terminate()
    deadline = time.monotonic() + _GRACE
    for child in running:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()
