"""A wheel built from the repository works from an empty folder, without the checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "train_num_samples=64", "batch_size=32", "epochs=1", "warmup=1", "workers=1", "eval_steps=0", "report_to=none",
    "device=cpu",
]  # fmt: skip


def run(*words: object, **options: object) -> subprocess.CompletedProcess:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it; torch and the like come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
        build, install = [*pip, "wheel", "-q", "--no-deps", "-w"], lambda python: [*pip, "--python", python, "install"]
    elif shutil.which("uv"):
        build = ["uv", "build", "-q", "--wheel", "-o"]
        install = lambda python: ["uv", "pip", "install", "--python", python]  # noqa: E731
    else:
        pytest.skip("neither pip nor uv is here to build a wheel")
    source = folder / "source"  # building leaves files behind
    for name in ("llip", "evals", "config_evals"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "submitit_openclip.py"):
        shutil.copy(ROOT / name, source)
    run(*build, folder, source)
    (wheel,) = folder.glob("llip-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # a line of a .pth adds the folder alone: an editable llip in it does not come along
    (packages / "parent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    run(*install(python), "-q", "--no-deps", wheel)
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_quickstart_runs_from_an_empty_folder(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": environment | {"LLIP_SCENES": str(tmp_path / "scenes")}}
    package = run(installed / "python", "-c", "import llip, evals; print(llip.__file__)", **where).stdout
    assert str(installed.parent) in package
    run(installed / "llip", "train", "llip_quickstart", *SMALL, **where)
    run(installed / "llip", "eval", "--fname", "config_evals/llip_quickstart.yaml", "--devices", "cpu", **where)
    results = json.loads((tmp_path / "logs/llip_quickstart/evals/results.json").read_text())
    assert set(results["tasks"]) == {"scenes_top_left", "scenes_red_shape", "scenes_background", "scenes_retrieval"}


@pytest.mark.slow
def test_the_console_command_lists_the_programs(installed, tmp_path):
    assert "doctor" in run(installed / "llip", cwd=tmp_path).stdout
