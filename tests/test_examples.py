"""The examples run as they stand, on a model made on the spot; what docs/ tells to type exists."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import llip
from llip.__main__ import PROGRAMS
from llip.config_search import search_config

ROOT = Path(__file__).parent.parent
TELLS = {"search_a_folder": "60 pictures indexed, 0 damaged"}
"""What each example that is a program must print, among other things."""
EXAMPLES = [ROOT / "examples" / f"{name}.py" for name in TELLS]
CONFIGS = {"extensions"}
"""Examples that hold a config: `tests/test_extensions.py` trains with them."""

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("explain", "plan", "search")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The quickstart's model, untrained."""
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms("ViT-Ti-8-scenes", mixture_tokens=8, pool_heads=4)
    path = tmp_path_factory.mktemp("example") / "checkpoint.pt"
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("forked")
def test_example_runs(example, checkpoint, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example), str(checkpoint), "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pictures = list((tmp_path / "out").glob("*.png"))
    assert pictures, "an example leaves a picture behind"
    for picture in pictures:
        assert min(Image.open(picture).size) > 200
    assert TELLS[example.stem] in done.stdout


def test_every_example_is_known():
    assert {example.stem for example in (ROOT / "examples").glob("*.py")} == set(TELLS) | CONFIGS


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_understood(page):
    """Every command line is read by the program that it calls: options, configs and fields."""
    commands = [line.split("#")[0] for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [shlex.split(command) for command in commands if command.strip()]
    assert commands
    for llip_command, program, *arguments in commands:
        assert llip_command == "llip"
        module = PROGRAMS[program][0].partition(":")[0]
        given = importlib.import_module(module).parse_arguments(arguments)
        if hasattr(given, "config"):
            search_config(given.config, given.overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_code_of_a_page_runs(page):
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_a_page_are_there(page):
    for path in re.findall(r"`((?:llip|examples|docs)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), path
