"""Git facts of a folder of code, and the commit of a copy of the code."""

import subprocess
from pathlib import Path

COMMIT_FILE = "COMMIT"
"""File beside the package in a snapshot of the code: the commit that the snapshot was taken from."""
_TIMEOUT = 60  # seconds


def git(root: Path, *words: str) -> str:
    """Return what `git` prints in `root`; empty where it fails or is not installed."""
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def is_checkout(root: Path) -> bool:
    """Return whether `root` is a checkout of this project, not a folder of packages inside another checkout."""
    top = git(root, "rev-parse", "--show-toplevel").strip()
    return bool(top) and Path(top).resolve() == root.resolve() and bool(git(root, "ls-files", "llip/__init__.py"))


def code_commit(root: Path) -> str | None:
    """Return the commit of the code in `root`, with `+changes` where tracked files differ from it; None if unknown."""
    if (root / COMMIT_FILE).is_file():
        return (root / COMMIT_FILE).read_text().strip() or None
    head = git(root, "rev-parse", "HEAD").strip() if is_checkout(root) else ""
    changed = bool(head) and bool(git(root, "status", "--porcelain", "--untracked-files=no").strip())
    return f"{head}{'+changes' if changed else ''}" if head else None
