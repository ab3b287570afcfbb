"""What benchmarks share: their options, clock, peak memory and separate processes."""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llip.errors import UserError


def benchmark_parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: `--threads`, `--device`, `--json`."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0], prog=f"python -m benchmarks.{name}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [%(default)s]")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    return parser


def set_up(options: argparse.Namespace) -> torch.device:
    """Apply the common options and return the device.

    Raises:
        UserError: no GPU here.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU was found; give --device cpu")
    torch.set_num_threads(options.threads)
    return torch.device(options.device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, kernels that it started included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(match[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # begins with what the parent had when it forked


def in_fresh_process(module: str, *arguments: object, timeout: float) -> Any:
    """Run a benchmark in a new process, with its own memory, and return the JSON that it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout)
