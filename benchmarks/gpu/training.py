"""Sections 4 to 7: a real step with its towers, the tests marked gpu, and collectives with one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.common import Setting, attempt, milliseconds


def _step(config_name: str, texts: int, setting: Setting, *overrides: str) -> dict[str, Any]:
    from benchmarks.step import measure
    from llip.config_search import search_config

    return measure(search_config(config_name, overrides), texts, setting.device, steps=1 if setting.tiny else 5)


def towers(setting: Setting) -> list[dict]:
    """Return steps with few texts, where the towers are all but everything: eager and compiled."""
    name, extra = ("llip_quickstart", ("batch_size=4",)) if setting.tiny else ("llip_b16_k32", ())
    texts = 4 if setting.tiny else 256
    rows = [attempt(f"{name}, {texts} texts", lambda: _step(name, texts, setting, *extra))]
    if not setting.tiny:
        rows.append(attempt("compiled", lambda: _step(name, texts, setting, *extra, "torchcompile=true")))
    return rows


def step(setting: Setting) -> list[dict]:
    """Return the step of published configs with all texts of the global batch: step, head's share, peak memory."""
    if setting.tiny:
        return [attempt("quickstart", lambda: _step("llip_quickstart", 8, setting, "batch_size=4"))]
    cases = [
        ("llip_b16_k32", ()),
        ("llip_b16_k32", ("score_kernel=eager",)),
        ("llip_G14_k64", ("grad_checkpointing=true",)),
    ]
    return [
        attempt(f"{name} {' '.join(more)}", lambda n=name, m=more: _step(n, 32_768, setting, *m))
        for name, more in cases
    ]


def semantics(setting: Setting) -> list[dict]:
    """Run the tests marked gpu: losses of the CPU, resume bit for bit, waits of the host."""

    def run() -> dict[str, Any]:
        if importlib.util.find_spec("pytest") is None or not Path("tests/test_gpu.py").is_file():
            return {"skipped": "pytest or tests/test_gpu.py is not here"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/test_gpu.py",
            *(["--collect-only"] if setting.tiny else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return {"exit_code": done.returncode, "last_line": (done.stdout.strip().splitlines() or [""])[-1]}

    return [attempt("tests marked gpu", run)]


def collectives(setting: Setting) -> list[dict]:
    """Return the time of the collectives that a run uses, in a group of one process."""
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.randn(1024, 512, device=setting.device)
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty_like(x), x),
        "gather_object": lambda: dist.gather_object({"a": 1}, [None]),
        "broadcast_object_list": lambda: dist.broadcast_object_list([1]),
    }
    if backend == "nccl":
        calls["reduce_scatter"] = lambda: dist.reduce_scatter_tensor(torch.empty_like(x), x)
    rows = [attempt(name, lambda c=call: {"ms": milliseconds(c, setting.device)}) for name, call in calls.items()]
    dist.destroy_process_group()
    return rows
