"""Checkpoint files: what a disk does to them, which ones stay, and what is refused."""

import resource
import zipfile

import pytest
import torch

from llip.errors import RunError, UserError
from llip.training import checkpoint
from llip.training.checkpoint import list_checkpoints, newest_good_checkpoint, verify, write_checkpoint


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
    with pytest.raises(UserError, match=r"step_2.pt.*damaged: the checksum of its part"):
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
    with pytest.raises(UserError, match=r"step_2.pt cannot be written: .*"):
        write_checkpoint(tmp_path, 2, content(2), keep=1)
    assert names(tmp_path) == ["latest.pt", "step_1.pt"]
    assert newest_good_checkpoint(tmp_path)[1]["step"] == 1


def test_the_one_before_stays_until_the_new_one_is_verified(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, content(1), keep=1)

    def wrong(path):
        assert path.name == "writing.tmp"
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
