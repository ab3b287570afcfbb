"""docs/environment.md names every environment variable of the code, and no other one of ours."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for name in ("llip", "evals", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in [*FILES, ROOT / "submitit_openclip.py"]}
PAGE = (ROOT / "docs" / "environment.md").read_text()


def constants() -> dict[str, str]:
    """Return the string constants of all modules by name."""
    return {
        target.id: node.value.value
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def is_environment(node: ast.AST) -> bool:
    return ast.unparse(node) in ("os.environ", "environment", "environ")


def names_of(node: ast.AST) -> list[ast.expr | None]:
    """Return the expressions that name a variable in one use of the environment."""
    if isinstance(node, ast.Subscript) and is_environment(node.value):
        return [node.slice]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if is_environment(node.func.value) and node.func.attr in ("get", "setdefault", "pop"):
            return [node.args[0]]
        if is_environment(node.func.value) and node.func.attr == "update":
            return [ast.Constant(keyword.arg) for keyword in node.keywords]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.getenv":
        return [node.args[0]]
    if isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
        return [node.left]
    return []


def variables() -> set[str]:
    """Return every variable that the code reads or sets by name, and ours in paths of configs and catalogs."""
    known, names = constants(), set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            for name in names_of(node):
                if isinstance(name, ast.Constant):
                    names.add(name.value)
                elif isinstance(name, ast.Name) and name.id in known:
                    names.add(known[name.id])
    files = [
        path
        for path in [*ROOT.glob("llip/**/*"), *ROOT.glob("config_evals/*")]
        if path.suffix in (".py", ".json", ".yaml")
    ]
    for path in files:
        text = path.read_text()
        names |= set(re.findall(r"\$\{?(LLIP_\w+)", text)) | set(re.findall(r"export ([A-Z]+)=", text))
        names |= set(re.findall(r"\"(LLIP_[A-Z_]+)\"", text))
    return names


def test_the_scan_sees_every_form():
    assert {"LLIP_CORES", "RANK", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "SLURM_RESTART_COUNT"} <= variables()


def test_the_page_is_complete():
    missing = sorted(name for name in variables() if f"`{name}`" not in PAGE)
    assert not missing, f"docs/environment.md lacks {missing}"


def test_the_page_names_nothing_of_ours_that_is_gone():
    assert set(re.findall(r"`(LLIP_\w+)`", PAGE)) <= variables() | {"LLIP_KILL_RESUME"}


@pytest.mark.parametrize("package", ["llip", "evals", "benchmarks"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(package):
    command = [
        sys.executable,
        "-c",
        f"import sys, {package}; from os import environ; print(environ['OMP_WAIT_POLICY'])",
    ]
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        printed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == expected
