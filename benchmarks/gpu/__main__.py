"""Everything that needs one GPU, in at most ten minutes: `python -m benchmarks.gpu [--out DIR] [--sections 1 2 ..]`.

Each section is a process with its own time limit, and its results are written to DIR/<section>.json as soon as it ends.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llip.system.files import write_json
from llip.system.program import program


class Section(NamedTuple):
    """What a section measures, its module and function, seconds it may take, and packages it needs."""

    about: str
    module: str
    function: str
    limit: int
    needs: tuple[str, ...] = ()


_TRAINING = ("open_clip", "timm")
SECTIONS = {
    1: Section("scores and gradients against float64", "scores", "correctness", 80),
    2: Section("eager scores at the published shapes", "scores", "head_cost", 80),
    3: Section("Triton kernels against eager and dense", "scores", "kernels", 90),
    4: Section("towers, eager and compiled", "training", "towers", 80, _TRAINING),
    5: Section("a step of llip_b16_k32 and llip_G14_k64", "training", "step", 110, _TRAINING),
    6: Section("tests marked gpu", "training", "semantics", 130, _TRAINING),
    7: Section("collectives with one process", "training", "collectives", 30),
}


def _missing(section: Section, device: str) -> str | None:
    """Return why a section cannot run here."""
    import importlib.util

    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU was found"
    absent = [name for name in section.needs if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def _run_section(number: int, device: str, tiny: bool) -> None:
    """Print the rows of a section as JSON; called in its process."""
    import importlib

    from benchmarks.gpu.common import Setting

    section = SECTIONS[number]
    module = importlib.import_module(f"benchmarks.gpu.{section.module}")
    function: Callable[[Setting], list[dict]] = getattr(module, section.function)
    print(json.dumps(function(Setting(torch.device(device), tiny))))


def _start(number: int, device: str, tiny: bool) -> dict[str, Any]:
    """Run a section in a process of its own; return its rows, or why there are none."""
    section = SECTIONS[number]
    result: dict[str, Any] = {"section": number, "about": section.about}
    if reason := _missing(section, device):
        return result | {"skipped": reason}
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", str(number), "--device", device]
    try:
        done = subprocess.run(
            command + ["--tiny"] * tiny, capture_output=True, text=True, timeout=section.limit, check=False
        )
        return result | {"rows": json.loads(done.stdout.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        return result | {"error": f"not done in {section.limit} s"}
    except (IndexError, ValueError):
        return result | {"error": f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"}


def _as_lines(result: dict[str, Any]) -> list[str]:
    head = f"{result['section']}. {result['about']}"
    if "rows" not in result:
        return [f"{head}: {'skipped, ' + result['skipped'] if 'skipped' in result else result['error']}"]
    rows = [f"   {row['name']}: " + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "name")
            for row in result["rows"]]  # fmt: skip
    return [head, *rows]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@program
def main(arguments: Sequence[str]) -> None:
    """Run the sections, one after another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, help="folder for the results, one file per section")
    parser.add_argument("--sections", type=int, nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    parser.add_argument("--child", type=int, choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _run_section(options.child, options.device, options.tiny)
        return
    gpu = torch.cuda.get_device_name() if options.device == "cuda" and torch.cuda.is_available() else None
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for number in options.sections:
        result = _start(number, options.device, options.tiny) | {"gpu": gpu, "torch": torch.__version__}
        results.append(result)
        if options.out:
            write_json(options.out / f"{number}.json", result)
        if not options.json:
            print("\n".join(_as_lines(result)), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
