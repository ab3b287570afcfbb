"""Every page in docs/: its commands, options, configs and fields are understood, and its files are there."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from llip.__main__ import PROGRAMS
from tests.test_readme import check_python

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page):
    """Return the words of each command that starts python or llip, the latter as `python -m MODULE`."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    modules = {name: place.partition(":")[0].removesuffix(".__main__") for name, (place, _) in PROGRAMS.items()}
    lines = [re.sub(r"^llip (\w+)", lambda match: f"python -m {modules[match[1]]}", line) for line in lines]
    return [shlex.split(line) for line in lines if re.match(r"(\w+=\S+ )*python ", line)]


def program_help(words, capsys, monkeypatch):
    """Return what the program of a command says to --help, its subcommand's too."""
    start = words.index("python")
    name = words[start + 1].removesuffix(".py") if words[start + 1] != "-m" else words[start + 2]
    rest = words[start + 2 :] if words[start + 1] != "-m" else words[start + 3 :]
    texts = []
    for arguments in (["--help"], [rest[0], "--help"] if rest and rest[0].isalpha() else ["--help"]):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit):
            runpy.run_module(name, run_name="__main__")
        texts.append(capsys.readouterr().out)
    return " ".join(texts)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page, capsys, monkeypatch):
    for words in commands(page):
        words = words[words.index("python") :]
        if "pytest" in words:
            continue
        check_python(words)
        options = [word for word in words if word.startswith("--")]
        if options:
            known = program_help(words, capsys, monkeypatch)
            for option in options:
                assert option in known, f"{' '.join(words)}: no {option}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_files(page):
    text = page.read_text()
    for path in re.findall(r"`((?:llip|evals|benchmarks|config_evals|examples|docs|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists() or path == "evals/results.md", path  # of a run
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / path).exists(), path


def test_there_are_pages():
    assert {page.stem for page in PAGES} >= {"method", "cluster", "evaluation", "extending", "weights"}
