"""One command for all programs: `llip <program>` and `python -m llip <program>`."""

import subprocess
import sys
import time

import pytest

from llip.__main__ import PROGRAMS, main


def test_the_list_names_every_program(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_answers_help(name, capsys):
    try:
        code = main([name, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert not code
    assert "usage" in capsys.readouterr().out


def test_an_unknown_program_names_the_nearest(capsys):
    assert main(["doctr", "x"]) == 2
    assert "unknown program 'doctr'. Did you mean 'doctor'?" in capsys.readouterr().err


def test_exit_codes_and_errors_pass_through(capsys):
    assert main(["train", "llip_b16_k23"]) == 2
    assert "llip_b16_k32" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--version"], ["train", "--list"], ["train", "--help"]])
def test_answers_at_once_and_without_torch(arguments):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module('llip', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=30)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1
