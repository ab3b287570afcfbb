"""The code as it was when a job was submitted, kept in the run's folder for as long as the job may be requeued."""

import hashlib
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import llip
from llip.configs import Config, config_fields
from llip.errors import UserError
from llip.extensions import FOLDER, extension_files
from llip.system.files import atomic_folder
from llip.system.git import COMMIT_FILE, code_commit, git, is_checkout

PACKAGES = ("llip", "evals")
LARGEST = 1 << 20
"""Bytes of the largest file outside the packages that is copied; larger ones are data."""


def take_snapshot(home: Path, extra: Mapping[str, str], runs: Path, write: bool = True) -> Path:
    """Copy the project's code to `home/<hash>` and return that folder; the same code gives the same folder.

    In a git checkout these are the tracked files and the new ones that git does not ignore, elsewhere the packages;
    without what runs have written, and without large files outside the packages.

    Args:
        home: folder of the snapshots.
        extra: further files, name -> text, written at the top.
        runs: folder that holds the runs' folders.
        write: False returns the folder without writing it.

    Raises:
        UserError: the folder cannot be written.
    """
    root = Path(llip.__file__).resolve().parent.parent
    try:
        files = {name: root / name for name in _code_files(root, [home.resolve().parent, runs.resolve()])}
        digest = hashlib.sha256()
        for name, path in sorted(files.items()):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        for name, text in sorted(extra.items()):
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        target = home.resolve() / digest.hexdigest()[:12]
        if write and not target.is_dir():
            _copy(files, extra, target)
    except OSError as error:
        raise UserError(f"the code cannot be copied to {str(home)!r}: {error}") from error
    return target


def _copy(files: Mapping[str, Path], extra: Mapping[str, str], target: Path) -> None:
    """Make `target` appear with all its files at once."""
    try:
        with atomic_folder(target) as temporary:
            for name, path in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / name)
            for name, text in extra.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(text, encoding="utf-8")
    except OSError:
        if not target.is_dir():  # else another submission was faster, with the same code
            raise


def use_snapshot(snapshot: Path) -> list[str]:
    """Return the shell lines that make Python import from the snapshot, and not from its current folder.

    The user's settings of these variables are kept, after ours.
    """
    return [
        'export TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}"  # seconds between lines of progress in the log',
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def copies_of_extensions(config: Config) -> dict[str, str]:
    """Return the user's files that a config names, as a snapshot holds them: name -> text.

    Raises:
        UserError: a file cannot be read, or two have one name.
    """
    copies: dict[str, str] = {}
    for field, path in extension_files(vars(config)).items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(f"{field} = {getattr(config, field)!r} cannot be copied: {error}") from error
        if copies.setdefault(f"{FOLDER}/{path.name}", text) != text:
            raise UserError(f"{field} = {getattr(config, field)!r}: another file of the config has that name")
    return copies


def frozen_config(config: Config, function: str) -> str:
    """Return the text of a config file whose `function` returns the resolved `config`, with every field.

    The user's files are those in the folder `extensions` beside the config file, if it has them.
    """
    assert function.isidentifier(), f"{function!r} does not name a function"
    lines = [f"        {name}={getattr(config, name)!r},\n" for name in config_fields()]
    imports, result = "from llip.configs import Config\n", "config"
    if extension_files(vars(config)):
        imports = "from pathlib import Path\n\nfrom llip.configs import Config\nfrom llip.extensions import relocate\n"
        folder = f"Path(__file__).parent / {FOLDER!r}"
        result = f"config.replace(**relocate(vars(config), {folder}, prefer=True))"
    return (
        '"""The config as it was resolved at submission."""\n\n'
        f"{imports}\n\n"
        f"def {function}() -> Config:\n"
        f'    """As submitted."""\n'
        f"    config = Config(\n{''.join(lines)}    )\n"
        f"    return {result}\n"
    )


def commit_file() -> dict[str, str]:
    """Return the file of a snapshot that holds its commit, which the run's provenance reads: name -> text."""
    commit = code_commit(Path(llip.__file__).resolve().parent.parent)
    return {COMMIT_FILE: f"{commit}\n"} if commit else {}


def _code_files(root: Path, left_out: list[Path]) -> Iterable[str]:
    """Yield the names, relative to `root`, of what belongs to the code."""
    if is_checkout(root):
        names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    else:
        paths = (path for package in PACKAGES for path in (root / package).rglob("*"))
        names = [str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts]
    left_out = [folder for folder in left_out if root in folder.parents]
    for name in dict.fromkeys(filter(None, names)):
        path = root / name
        if not path.is_file() or any(path.is_relative_to(folder) for folder in left_out):
            continue
        if Path(name).parts[0] in PACKAGES or path.stat().st_size <= LARGEST:
            yield name
