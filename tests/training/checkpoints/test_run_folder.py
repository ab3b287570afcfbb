"""A run's folder on disks that are full, cannot lock, or hold what a killed process left."""

import errno
import fcntl
import json
import resource
import subprocess
import time

import pytest
import torch

from llip.configs import Config
from llip.errors import CollectiveUserError, UserError
from llip.system import locks
from llip.system.processes import Processes
from llip.training import setup
from llip.training.checkpoints import records, run_folder
from llip.training.checkpoints.records import append_record, cut_back, locked_evaluations, read_records
from llip.training.checkpoints.run_folder import claim_folder, locked_folder

CONFIG = Config(name="run", train_data="pairs.tar", train_num_samples=1000)


@pytest.fixture
def full_disk():
    """No file may grow beyond a few bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(bytes_left):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, errno.errorcode[number])

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.3)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_at_once(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    kind, place = subprocess.check_output(["df", "--output=fstype,target", tmp_path], text=True).split()[-2:]
    begin = time.monotonic()
    with pytest.raises(UserError) as raised, locked_folder(tmp_path / "run"):
        pass
    assert time.monotonic() - begin < 0.3
    for part in (errno.errorcode[number], f"{kind} at {place}", "flock", "logs=DIR", str(tmp_path / "run")):
        assert part in str(raised.value), part


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds_is_waited_for(tmp_path, monkeypatch, number):
    refuse(monkeypatch, number)
    begin = time.monotonic()
    with pytest.raises(UserError, match="in use by another process"), locked_folder(tmp_path):
        pass
    assert time.monotonic() - begin >= 0.3


def test_a_run_that_goes_on_needs_no_room(tmp_path, full_disk):
    claim_folder(tmp_path, CONFIG, started=False)
    records = tmp_path / "metrics.jsonl"
    records.write_text('{"step": 1}\n' * 3)
    full_disk(0)
    with locked_folder(tmp_path):
        assert claim_folder(tmp_path, CONFIG, started=True) == []
        cut_back(records, 1)
    assert records.read_text() == '{"step": 1}\n' * 3


def test_cut_back_leaves_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    left = b'{"step": 1, "a": null}\n\0\0\0\n[3]\n{"a": 1}\n{"st\xff": 2}\n{"step": 2}\n{"step": 3}\n{"step": 2, "x'
    path.write_bytes(left)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1, "a": null}\n{"step": 2}\n'
    assert [name.name for name in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_cannot_be_cut_back_stays_as_it_is(tmp_path, full_disk):
    path = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"step": {step}}}\n' for step in range(100))
    path.write_text(text)
    full_disk(50)
    with pytest.raises(OSError, match=r"metrics\.jsonl") as raised:
        cut_back(path, 90)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == text
    assert [name.name for name in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_config_that_cannot_be_written_names_itself_and_leaves_the_old(tmp_path, full_disk):
    (tmp_path / "config.yaml").write_text("old: true\n")
    full_disk(50)
    with pytest.raises(OSError, match=r"config\.yaml"):
        claim_folder(tmp_path, CONFIG, started=False)
    assert (tmp_path / "config.yaml").read_text() == "old: true\n"


def test_a_line_is_written_whole_or_not_at_all(tmp_path, full_disk):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})
    full_disk(30)
    with pytest.raises(OSError, match="too large"):
        append_record(path, {"step": 2, "values": list(range(20))})
    append_record(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("before", ["", '{"step": 1}\n'])
def test_a_line_after_half_a_line_takes_its_place(tmp_path, before):
    path = tmp_path / "evals.jsonl"
    path.write_text(before + '{"step": 2, "ta')
    append_record(path, {"step": 3})
    assert path.read_text() == before + '{"step": 3}\n'


def test_evaluations_that_stay_locked_do_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORDS_PATIENCE", 0.2)
    with open(tmp_path / ".evals.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(TimeoutError, match=r"in use by another process.*evals\.jsonl"),
            locked_evaluations(tmp_path),
        ):
            pass


def _start(rank: int, count: int, logs: str) -> tuple[str, str]:
    processes = Processes(rank, count, torch.device("cpu"))
    try:
        with setup.open_folder(CONFIG.replace(logs=logs), processes):
            return "nothing", ""
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "log.txt"])
def test_every_process_hears_of_a_file_that_cannot_be_written(tmp_path, pool, name):
    (tmp_path / "run" / name).mkdir(parents=True)  # no file can be opened there, not even by root
    first, second = pool.run(_start, 2, str(tmp_path))
    assert first == second
    assert first[0] == "CollectiveUserError"
    assert str(tmp_path / "run" / name) in first[1]
    assert "make room" in first[1]


def _fail_alone(rank: int, count: int) -> str:
    try:
        with setup._all_fail_alike(Processes(rank, count, torch.device("cpu"))):
            if rank == 1:
                raise OSError(errno.EIO, "Input/output error", "shard.tar")
    except CollectiveUserError as error:
        return str(error)
    return "nothing"


def test_a_failure_of_another_process_is_not_lost(pool):
    first, second = pool.run(_fail_alone, 2)
    assert first == second
    assert "shard.tar" in first


def test_records_that_cannot_be_cut_back_are_agreed_upon(tmp_path, full_disk):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(100)))
    full_disk(50)
    alone = Processes(0, 1, torch.device("cpu"))
    with pytest.raises(CollectiveUserError, match=r"metrics\.jsonl"), setup._all_fail_alike(alone):
        cut_back(path, 90)


@pytest.mark.parametrize("text", ["[1]", "epochs: many", "batch_size: {}", "nodes: null", "a: b: c", "\xff\xfe"])
def test_a_damaged_config_is_the_users_to_remove(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        claim_folder(tmp_path, CONFIG, started=True)
