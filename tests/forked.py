"""Python programs in processes forked from one that has imported torch and open_clip, which otherwise takes seconds."""

import contextlib
import functools
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.preload"])

_execute_child = inspect.signature(subprocess.Popen._execute_child)


@functools.cache
def start_server() -> None:
    """Start the process that the others are forked from."""
    with contextlib.chdir(ROOT):  # where it imports from
        forkserver.ensure_running()


class ForkedProgram(subprocess.Popen):
    """`subprocess.Popen` that forks `[python, ...]` with `-m module`, `-c code` or a script, and executes the others.

    A forked process leads its own session. Its environment in /proc is that of the process it was forked from. If it is
    the launcher of a run, that run's processes are forked from it.
    """

    context: Any = FORKSERVER
    _process: Any = None

    def _execute_child(self, *given: Any) -> None:
        call = _execute_child.bind(self, *given).arguments
        if isinstance(call["args"], str) or call["args"][0] != sys.executable:
            super()._execute_child(*given)
            return
        environment = dict(os.environ if call["env"] is None else call["env"])
        streams = [_Stream(call[name]) for name in ("p2cread", "c2pwrite", "errwrite")]
        arguments = (list(map(str, call["args"])), call["cwd"], environment, streams)
        if self.context is FORKSERVER:
            start_server()
        self._process = self.context.Process(target=_become, args=arguments)
        self._process.start()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*(call[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write")))

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*given, **named)
        self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run_forked(*words: object, timeout: float, **options: Any) -> subprocess.CompletedProcess:
    """Run `[python, ...]` to its end like `subprocess.run`, and capture what it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ForkedProgram(list(map(str, words)), **pipes, **options) as process:
        try:
            printed = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, *printed)


class _ForkedRank(ForkedProgram):
    """A process that a forked launcher starts."""

    context = multiprocessing.get_context("fork")


class _Stream:
    """A file descriptor of the parent, -1 for what the child inherits."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _received, (reduction.DupFd(self.number) if self.number >= 0 else None,)


def _received(descriptor: Any) -> _Stream:
    return _Stream(-1 if descriptor is None else descriptor.detach())


def _become(command: list[str], cwd: str | None, environment: dict[str, str], streams: list[_Stream]) -> None:
    """Run the command in this process as Python would after an `exec`."""
    os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for target, stream in enumerate(streams):
        if stream.number >= 0:
            os.dup2(stream.number, target)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.close(int(name))  # a launcher's
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    _fork_ranks()
    if command[1] == "-m":
        sys.argv = command[2:]
        sys.modules.pop(command[2], None)
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    elif command[1] == "-c":
        sys.argv = ["-c", *command[3:]]
        exec(compile(command[2], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command[1:]
        sys.path.insert(0, str(Path(command[1]).absolute().parent))
        runpy.run_path(command[1], run_name="__main__")


def _fork_ranks() -> None:
    """Let PyTorch's elastic launcher fork its processes from this one."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    assert subprocess_handler.Popen
    subprocess_handler.Popen = _ForkedRank  # type: ignore[misc]
