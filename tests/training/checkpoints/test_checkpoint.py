"""Checkpoint files: what a disk does to them, which ones stay, and what is refused."""

import resource
import zipfile

import pytest
import torch

from llip.errors import RunError, UserError
from llip.open_clip.weights.load import read_checkpoint
from llip.training.checkpoints import checkpoint
from llip.training.checkpoints.checkpoint import (
    list_checkpoints,
    newest_good_checkpoint,
    save_tensors,
    verify,
    write_checkpoint,
)


def content(step=0):
    return {"step": step, "state_dict": {"weight": torch.randn(300, 300)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 kB: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(bytes_left=100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_newest_stay_and_every_nth_for_good(tmp_path):
    for step in range(1, 10):
        write_checkpoint(tmp_path, step, content(step), keep=2, forever=4)
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["step_9", "step_8", "step_4"]
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["step"] == 9


def test_a_flipped_bit_is_noticed_though_loading_does_not(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, content(step), keep=0)
    newest = tmp_path / "step_2.pt"
    data = bytearray(newest.read_bytes())
    with zipfile.ZipFile(newest) as file:
        member = next(item for item in file.infolist() if item.file_size > 100_000)
    data[member.header_offset + 50_000] ^= 4
    newest.write_bytes(data)
    torch.load(newest, weights_only=True)  # goes through, with other numbers
    with pytest.raises(UserError, match=r"step_2.pt.*damaged: wrong checksum of entry"):
        verify(newest)
    path, found, warnings = newest_good_checkpoint(tmp_path)
    assert (path.name, found["step"]) == ("step_1.pt", 1)
    assert "step_2.pt" in warnings[0]
    assert "checksum" in warnings[0]


def test_what_is_cut_off_is_noticed(tmp_path):
    write_checkpoint(tmp_path, 1, content(), keep=0)
    path = tmp_path / "step_1.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"step_1.pt.*damaged"):
        verify(path)


def test_a_full_disk_leaves_the_one_before_and_no_litter(tmp_path, full_disk):
    write_checkpoint(tmp_path, 1, content(1), keep=1)
    full_disk()
    with pytest.raises(UserError, match=r"step_2.pt cannot be written: File too large$"):
        write_checkpoint(tmp_path, 2, content(2), keep=1)
    assert names(tmp_path) == ["latest.pt", "step_1.pt"]
    assert newest_good_checkpoint(tmp_path)[1]["step"] == 1


def test_a_full_disk_is_named_by_its_own_error(tmp_path, full_disk):
    full_disk()
    with pytest.raises(OSError, match=r"File too large.*weights.pt"):
        save_tensors(content(), tmp_path / "weights.pt")


def test_the_one_before_stays_until_the_new_one_is_verified(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, content(1), keep=1)

    def wrong(path):
        assert path.suffix == ".tmp"
        raise UserError(f"checkpoint {path} is damaged")

    monkeypatch.setattr(checkpoint, "verify", wrong)
    with pytest.raises(UserError, match="damaged"):
        write_checkpoint(tmp_path, 2, content(2), keep=1)
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["step"] == 1
    assert (tmp_path / "step_1.pt").is_file()
    assert not (tmp_path / "step_2.pt").exists()


def test_only_plain_tensors_and_containers_are_read(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "odd": RunError("an object of ours")}, tmp_path / "step_1.pt")
    with pytest.raises(UserError, match="no checkpoint of the run can be read"):
        newest_good_checkpoint(tmp_path)


def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    """One bit of every byte of a small file, most of which is the zip's own: names, sizes, methods, places."""
    path = tmp_path / "step_1.pt"
    weight = torch.arange(8.0)
    torch.save({"format": checkpoint.FORMAT, "weight": weight}, path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            verify(path)
            found = read_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert torch.equal(found["weight"], weight), place
    assert refused > len(whole) // 3


@pytest.mark.parametrize(
    ("offset", "value"),
    [(6, 99), (8, 1), (8, 1 << 5), (10, 77), (46, 0xFF)],
    ids=["version", "encrypted", "patched", "method", "name"],
)
def test_a_damaged_directory_means_the_checkpoint_before(tmp_path, offset, value):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, content(step), keep=0)
    newest = tmp_path / "step_2.pt"
    data = bytearray(newest.read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first of the directory; offsets as in PKWARE's description, 4.3.12
    data[entry + offset] = value
    data[entry + 9] |= 8  # names are UTF-8
    newest.write_bytes(data)
    path, _, warnings = newest_good_checkpoint(tmp_path)
    assert path.name == "step_1.pt"
    assert "damaged" in warnings[0]


def test_a_part_that_is_marked_as_a_folder_is_damage(tmp_path):
    """Its checksum fits, and torch would take whatever lies in memory for the weights."""
    write_checkpoint(tmp_path, 1, content(), keep=0)
    path = tmp_path / "step_1.pt"
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    data[entry + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: entry '.*/data/0' is marked as a folder"):
        verify(path)


def test_a_disk_that_fails_between_two_looks_means_the_checkpoint_before(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, content(step), keep=0)

    def failing(path):
        if path.name == "step_2.pt":
            raise OSError(5, "Input/output error", str(path))
        return read_checkpoint(path)

    monkeypatch.setattr(checkpoint, "read_checkpoint", failing)
    path, _, warnings = newest_good_checkpoint(tmp_path)
    assert path.name == "step_1.pt"
    assert "step_2.pt" in warnings[0]


def test_an_old_checkpoint_that_stays_is_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint.log, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "step_2.pt").mkdir()  # what cannot be unlinked, not even by root
    (tmp_path / "step_1.pt").write_bytes(b"old")
    write_checkpoint(tmp_path, 3, content(3), keep=1)
    assert names(tmp_path) == ["latest.pt", "step_2.pt", "step_3.pt"]
    assert len(said) == 1
    assert "step_2.pt" in said[0]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    (tmp_path / "step_1.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "folder.tmp").mkdir()  # what cannot be removed does not matter
    write_checkpoint(tmp_path, 2, content(2), keep=1)
    assert names(tmp_path) == ["folder.tmp", "latest.pt", "step_2.pt"]
