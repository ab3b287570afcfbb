"""The tree is the architecture: imports go down only and never in a circle; rooms, files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["llip.errors"],
    ["llip.system"],
    ["llip.extensions", "llip.configs", "llip.config_checks", "llip.config_search", "llip.run_configs", "llip.cli"],
    ["llip.scenes"],
    ["llip.open_clip"],
    ["llip.data"],
    ["llip.clipeval"],
    ["llip.training"],
    ["llip.main"],
    ["llip.cluster", "llip.tools"],
    ["evals"],
    ["submitit_openclip", "llip.__main__", "benchmarks"],
]
"""From the ground up; a module imports from its own layer and those below."""
LONGEST_FILE, LONGEST_FUNCTION, MOST_FILES = 400, 60, 16

FILES = sorted(path for folder in ("llip", "evals", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
FILES.append(ROOT / "submitit_openclip.py")
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the project's modules that a file imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


IMPORTS = {name: sorted(set(imports_of(TREES[path])) & (MODULES.keys() - {name})) for name, path in MODULES.items()}


def layer_of(module: str) -> int | None:
    """Return the layer of the longest prefix that matches; None for a package's face (`llip/__init__.py`)."""
    found = [
        (len(prefix), level)
        for level, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(found)[1] if found else None


def test_every_module_has_a_layer():
    assert [name for name in MODULES if layer_of(name) is None] == ["llip"]


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if None not in (layer_of(name), layer_of(other)) and layer_of(other) > layer_of(name)
    ]
    assert not upward, "\n".join(upward)


def test_no_import_circle():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    long = [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long, "; ".join(long)


def test_no_room_is_crowded():
    folders = {path.parent for path in FILES}
    crowded = {
        str(f.relative_to(ROOT)): len([p for p in FILES if p.parent == f and p.name != "__init__.py"]) for f in folders
    }
    assert not {name: count for name, count in crowded.items() if count > MOST_FILES}
