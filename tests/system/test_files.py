"""Atomic writes: whole or absent, and errors that name the file."""

import errno

import pytest

from llip.system.files import atomic_folder, atomic_write, write_json, write_text


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_write(path, flush=True) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert raised.value.filename == str(path)


def test_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.a\.txt"):
        write_text(tmp_path / "gone" / "a.txt", "text")


def test_a_folder_appears_at_once_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "a").read_text() == "a"
    for target, error in ((tmp_path / "failed", KeyError()), (tmp_path / "made", None)):
        with pytest.raises((KeyError, OSError)):
            _make(target, error)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["a"]


def _make(target, error):
    with atomic_folder(target) as folder:
        (folder / "b").write_text("b")
        if error is not None:
            raise error
