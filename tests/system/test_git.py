"""The commit of a folder of code."""

import subprocess
from pathlib import Path

from llip.system.git import COMMIT_FILE, code_commit


def run_git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", "-C", folder, *settings, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_of_a_checkout_a_snapshot_and_neither(tmp_path):
    (tmp_path / "llip").mkdir()
    package = tmp_path / "llip" / "__init__.py"
    package.write_text("")
    assert code_commit(tmp_path) is None
    run_git(tmp_path, "init", "-q")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-qm", "first")
    head = run_git(tmp_path, "rev-parse", "HEAD")
    assert code_commit(tmp_path) == head
    package.write_text("x = 1\n")
    assert code_commit(tmp_path) == f"{head}+changes"
    inside = tmp_path / "site-packages"
    (inside / "llip").mkdir(parents=True)
    (inside / "llip" / "__init__.py").write_text("")
    assert code_commit(inside) is None, "a checkout around an installed package is another project's"
    (inside / COMMIT_FILE).write_text("abc\n")
    assert code_commit(inside) == "abc"
