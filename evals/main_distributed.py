"""One process per device: on this machine, started and ended together; or on a SLURM cluster, one task per GPU.

    python -m evals.main_distributed --fname config_evals/X.yaml --ngpus 8 --partition gpu

submits an evaluation to SLURM; `python -m evals.main_mc` runs it on this machine.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llip.cluster import step
from llip.errors import EXIT_USER, UserError
from llip.system.cores import usable_cores
from llip.system.exit_with_parent import exit_with_parent
from llip.system.files import write_text
from llip.system.processes import GROUP_TIMEOUT
from llip.system.program import program


def choose_devices(names: Sequence[str] | None) -> list[str]:
    """Return the devices to use: `names` checked against what is there, or all CUDA devices, or one cpu.

    Raises:
        UserError: an unknown device, one that is not there or is named twice, or a mix of cpu and cuda.
    """
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not names:
        return found or ["cpu"]
    names = ["cuda:0" if name == "cuda" else name for name in names]
    for name in names:
        if name != "cpu" and name not in found:
            raise _unknown_device(name, found)
        if name != "cpu" and names.count(name) > 1:
            raise UserError(f"--devices names {name} more than once; one process per GPU")
    if "cpu" in names and set(names) != {"cpu"}:
        raise UserError(f"--devices {' '.join(names)}: either cpu or cuda, not both")
    return names


def _unknown_device(name: str, found: list[str]) -> UserError:
    if "," in name:
        return UserError(f"--devices {name}: separate devices by spaces: --devices {' '.join(name.split(','))}")
    spelled = f"cuda:{name}" if name.isdecimal() else name.lower()
    if spelled in ("cpu", *found):
        return UserError(f"--devices {name}: there is no such device. Did you mean {spelled!r}?")
    if not found:
        return UserError(f"--devices {name}: this machine has no CUDA device; write --devices cpu")
    here = ", ".join(["cpu", *found])
    return UserError(f"--devices {name}: this machine has {here}; for instance --devices {' '.join(found)}")


def launch(worker: Callable[..., None], devices: Sequence[str], *args: Any) -> None:
    """Run `worker(device, *args)` for each device: in this process for one, else in a process group of new ones.

    Inside a SLURM job (see `evals.slurm_job`) the job's tasks do it, each on its own of this node's devices.

    Args:
        worker: an importable function; its arguments must pickle when there are several devices.

    Raises:
        UserError: a worker raised it. Exception: a worker failed otherwise (the message holds its traceback).
    """
    if step.is_leading():
        step.everywhere(_on_own_device, list(devices), worker, args)
        return
    if len(devices) == 1:
        _use_device(devices[0])
        worker(devices[0], *args)
        return
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # ending the others is no news to the user
    with tempfile.TemporaryDirectory(prefix="llip_evals_") as folder:
        arguments = (os.getpid(), worker, list(devices), args, folder)
        context = mp.start_processes(_child, args=arguments, nprocs=len(devices), join=False, start_method="spawn")
        try:
            while not context.join(timeout=5):
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            mistakes = sorted(Path(folder).glob("mistake_*.txt"))
            if mistakes:
                raise UserError(mistakes[0].read_text(encoding="utf-8")) from None
            raise
        finally:
            _end(context.processes)


def _child(rank: int, parent: int, worker: Callable[..., None], devices: list[str], args: tuple, folder: str) -> None:
    exit_with_parent(parent, 1)
    device = devices[rank]
    _use_device(device)
    if device == "cpu":
        torch.set_num_threads(max(1, usable_cores() // len(devices)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes are here; host names need not resolve
    backend = "gloo" if device == "cpu" else "nccl"
    init_method = f"file://{folder}/group"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=len(devices), timeout=GROUP_TIMEOUT)
    try:
        worker(device, *args)
    except UserError as mistake:
        write_text(Path(folder, f"mistake_{rank}.txt"), str(mistake))
        sys.stdout.flush()
        os._exit(EXIT_USER)  # the others may wait in a collective; the parent ends them
    dist.destroy_process_group()


def _on_own_device(devices: list[str], worker: Callable[..., None], args: tuple) -> None:
    worker(devices[int(os.environ["LOCAL_RANK"])], *args)


def _use_device(device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)


def _end(processes: Sequence[Any], grace: float = 5.0) -> None:
    """Terminate what still runs, then kill what does not listen."""
    running = [process for process in processes if process.is_alive()]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + grace
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@program
def main(argv: Sequence[str]) -> int:
    """Submit an evaluation to SLURM and print where to look. Returns the exit code."""
    from evals.slurm_job import parse_arguments, submit

    argv = argv
    submit(parse_arguments(argv), argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
