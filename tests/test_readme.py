"""What README names exists: paths, commands, configs, and config fields."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from llip.__main__ import PROGRAMS
from llip.config_search import list_configs
from llip.configs import config_fields

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
PATHS = sorted(
    set(re.findall(r"\]\(([^)#:]+)\)", README))
    | set(re.findall(r"^((?:llip|evals|config_evals|benchmarks|tests|docs)/\S*|\w+\.py) ", README, re.MULTILINE))
    | set(re.findall(r"(?:llip|config_evals|benchmarks|docs|tests)/[\w./]*\w\.(?:py|yaml|json|svg|png)", README))
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command):
    """Programs, modules, make targets, YAML files, configs and fields of every command line."""
    if "&&" in command:
        for part in command.split("&&"):
            test_command_exists(part.strip())
        return
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[0] in ("pip", "conda", "source"):
        for word in words:
            assert not word.endswith(".txt") or (ROOT / word).is_file()
    elif words[0] == "llip":
        check_llip(words)
    else:
        assert words[0] in ("python", "torchrun"), command
        check_python(words)


def check_llip(words):
    """`llip <program> ...`: the program is there."""
    assert words[1] in PROGRAMS, words


def check_python(words):
    if words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
        arguments = words[2:]
    else:
        module = words[words.index("-m") + 1]
        assert module == "venv" or importlib.util.find_spec(module), module
        arguments = words[words.index("-m") + 2 :]
    for word in arguments:
        name, separator, _ = word.partition("=")
        if separator and not word.startswith("-"):
            assert name in config_fields(), word
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
    is_training = any(word in ("llip.main", "submitit_openclip.py") for word in words)
    if is_training and not arguments[0].startswith("--") and ".py:" not in arguments[0]:
        assert arguments[0] in list_configs(), arguments[0]


def test_no_placeholder_is_left():
    assert "@@" not in README


def test_there_is_something_to_check():
    assert len(COMMANDS) > 15
    assert len(PATHS) > 12
