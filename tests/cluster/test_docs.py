"""Every command of docs/cluster.md is one that our programs read, and every option and file it names is there."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from evals.main_distributed import parse_arguments
from llip.cluster.options import add_slurm_options
from llip.cluster.training import parse_training

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
TRAINING = [words[2:] for words in COMMANDS if words[1] == "submitit_openclip.py" and "--help" not in words]
EVALUATION = [words[3:] for words in COMMANDS if "evals.main_distributed" in words]


@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_training_commands_resolve(words):
    assert parse_training(words).config.total_steps > 0


@pytest.mark.parametrize("words", EVALUATION, ids=" ".join)
def test_evaluation_commands_resolve(words):
    assert (ROOT / parse_arguments(words).fname).is_file()


def test_there_is_something_to_check():
    assert len(TRAINING) >= 3
    assert len(EVALUATION) >= 2


def test_options_exist():
    known = subprocess.run(
        [sys.executable, "submitit_openclip.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    parser = argparse.ArgumentParser()
    add_slurm_options(parser, cpus="")
    known += parser.format_help() + "--nodes" + get_args_parser().format_help()
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE):
        assert option in known or any(option in words for words in EVALUATION), option


def test_files_exist():
    for path in re.findall(r"`((?:tests|docs)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path
