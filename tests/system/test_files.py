"""Atomic writes: whole or absent, and errors that name the file."""

import errno

import pytest

from llip.system.files import atomic_write, write_json, write_text


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
