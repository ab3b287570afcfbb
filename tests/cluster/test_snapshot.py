"""The code of a job: what is copied, and that the copy is what runs."""

import subprocess
import sys
from pathlib import Path

import pytest

import llip
from llip.cluster.checks import check_training
from llip.cluster.snapshot import (
    LARGEST,
    commit_file,
    copies_of_extensions,
    frozen_config,
    take_snapshot,
    use_snapshot,
)
from llip.config_search import list_configs, search_config
from llip.configs import Config
from llip.errors import UserError
from llip.extensions import portable_name


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", "-C", folder, *settings, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout that stands for the project's."""
    root = tmp_path / "project"
    files = {
        "llip/__init__.py": "where = 'checkout'\n",
        "llip/training/loop.py": "x = 1\n",
        "llip/table.txt": "y" * (LARGEST + 1),
        "evals/__init__.py": "",
        "readme.md": "words",
        ".gitignore": "ignored/\n*.pyc\n",
        "ignored/secret.txt": "z",
        "data/huge.bin": "b" * (LARGEST + 1),
        "runs/first/log.txt": "l",
        "new_config.py": "n = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(llip, "__file__", str(root / "llip" / "__init__.py"))
    return root


def commit(project: Path) -> None:
    git(project, "init", "-q")
    git(project, "add", "llip", "evals", "readme.md", ".gitignore", "data")
    git(project, "commit", "-qm", "first")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


CODE = {"llip/__init__.py", "llip/training/loop.py", "llip/table.txt", "evals/__init__.py"}


def test_a_checkout_gives_its_files_and_new_ones_but_no_data_and_no_runs(project: Path):
    commit(project)
    (project / "llip" / "training" / "new.py").write_text("")
    taken = take_snapshot(project / "runs" / "mine" / "code", {"extra.py": "e"}, project / "runs")
    expected = CODE | {"llip/training/new.py", "readme.md", ".gitignore", "new_config.py", "extra.py"}
    assert names(taken) == expected
    assert (taken / "extra.py").read_text() == "e"


def test_outside_a_checkout_the_packages_are_taken(project: Path, tmp_path: Path):
    (project / "llip" / "__pycache__").mkdir()
    (project / "llip" / "__pycache__" / "loop.pyc").write_text("")
    assert names(take_snapshot(tmp_path / "code", {}, tmp_path / "runs")) == CODE
    assert commit_file() == {}


def test_somebody_elses_checkout_around_an_installed_package_is_not_taken(project: Path, tmp_path: Path):
    git(tmp_path, "init", "-q")
    (tmp_path / "thesis.txt").write_text("mine")
    git(tmp_path, "add", "thesis.txt")
    assert names(take_snapshot(tmp_path / "code", {}, tmp_path / "runs")) == CODE


def test_the_same_code_is_the_same_folder_and_an_edit_another_one(project: Path, tmp_path: Path):
    def take(**extra: str) -> Path:
        return take_snapshot(tmp_path / "code", extra, tmp_path / "runs")

    first = take()
    assert take() == first
    assert take(config="a") != first
    (project / "llip" / "training" / "loop.py").write_text("x = 2\n")
    second = take()
    assert second != first
    assert (first / "llip" / "training" / "loop.py").read_text() == "x = 1\n"
    assert len(list((tmp_path / "code").iterdir())) == 3  # and nothing half made


def test_a_dry_run_writes_nothing_and_tells_the_same_folder(project: Path, tmp_path: Path):
    snapshot = take_snapshot(tmp_path / "code", {}, tmp_path / "runs", write=False)
    assert not (tmp_path / "code").exists()
    assert take_snapshot(tmp_path / "code", {}, tmp_path / "runs") == snapshot


def test_the_commit_is_told_with_changes(project: Path):
    commit(project)
    expected = git(project, "rev-parse", "HEAD")
    assert commit_file() == {"COMMIT": expected + "\n"}
    (project / "readme.md").write_text("other words")
    assert commit_file() == {"COMMIT": expected + "+changes\n"}


def test_a_folder_that_cannot_be_written_is_the_users_mistake(project: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="code cannot be copied"):
        take_snapshot(tmp_path / "file" / "code", {}, tmp_path / "runs")


def test_python_imports_the_snapshot_in_the_folder_of_the_checkout(project: Path, tmp_path: Path):
    """As a job does: started in the checkout, with -m, which would otherwise import from there."""
    taken = take_snapshot(tmp_path / "a folder with spaces", {"probe.py": "import llip; print(llip.where)"}, tmp_path)
    (taken / "llip" / "__init__.py").write_text("where = 'snapshot'\n")
    (project / "probe.py").write_text("import llip; print(llip.where)")
    commands = "\n".join([*use_snapshot(taken), f"{sys.executable} -m probe"])
    done = subprocess.run(["bash", "-c", commands], cwd=project, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "snapshot"
    bare = subprocess.run([sys.executable, "-m", "probe"], cwd=project, capture_output=True, text=True, timeout=60)
    assert bare.stdout.strip() == "checkout"


@pytest.mark.parametrize("name", ["llip_quickstart", "llip_b16_k32", "siglip_b16"])
def test_a_frozen_config_is_the_config(name: str, tmp_path: Path):
    assert name in list_configs()
    words = ["lr=1e-3", "train_data=pipe:cat 'a b'.tar", "report_to=none", "grad_clip=none", "name=a name"]
    config = search_config(name, words)
    path = tmp_path / "frozen.py"
    path.write_text(frozen_config(config, name))
    assert search_config(f"{path}:{name}") == config


MINE = """
from llip.configs import Config


class Mine:
    note = "as submitted"

    @classmethod
    def build(cls, mixture_tokens, width, heads, temperature):
        return cls()


def mine() -> Config:
    return Config(pooling=f"{__file__}:Mine", lr=0.25)
"""
JOB = """
import sys
from llip.config_search import search_config
from llip.extensions import find_extension
config = search_config(sys.argv[1])
print(config.lr, find_extension("pooling", config.pooling).note, config.pooling)
"""


def test_a_pooling_from_a_file_goes_into_the_snapshot_as_it_was(tmp_path: Path):
    file = tmp_path / "lab" / "mine.py"
    file.parent.mkdir()
    file.write_text(MINE)
    config = search_config(f"{file}:mine")
    copies = copies_of_extensions(config)
    assert copies == {"extensions/mine.py": MINE}
    taken = take_snapshot(tmp_path / "code", {"frozen.py": frozen_config(config, "mine"), **copies}, tmp_path / "runs")
    checked = check_training(config.replace(train_data="scenes:somewhere", train_num_samples=10**4))
    assert len(checked) == 1
    file.write_text("raise SystemExit('edited after the submission')")
    command = [sys.executable, "-c", JOB, f"{taken / 'frozen.py'}:mine"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == f"0.25 as submitted {taken}/extensions/mine.py:Mine", done.stderr
    # the copy is the same experiment as the original
    assert portable_name(config.pooling) == portable_name(f"{taken}/extensions/mine.py:Mine") == "mine.py:Mine"


def test_a_file_that_does_not_run_is_refused_before_the_job(tmp_path: Path):
    (tmp_path / "mine.py").write_text("from .other import x\n" + MINE)
    with pytest.raises(UserError, match=r"mine\.py' does not run: line 1: ImportError"):
        check_training(Config(pooling=f"{tmp_path}/mine.py:Mine", train_data="scenes:x", train_num_samples=10**4))


def test_what_is_shipped_needs_no_copy():
    assert copies_of_extensions(search_config("llip_quickstart")) == {}
