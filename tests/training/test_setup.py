"""What a run finds out about its data before it reads them."""

import json
import os

import pytest
import torch

from llip.configs import Config
from llip.data.index import describe_shard, write_index
from llip.errors import UserError
from llip.system.processes import Processes
from llip.training.reporting.run_log import start_logging
from llip.training.setup import check_data
from tests.helpers import write_pairs

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def said(tmp_path):
    """The log's text so far."""
    folder = tmp_path / "run"
    folder.mkdir()
    start_logging(folder)
    yield lambda: (folder / "log.txt").read_text()
    start_logging(None)


def config(pattern, **changes):
    return Config(
        train_data=pattern, **{"batch_size": 2, "workers": 1, "train_num_samples": 20, "epochs": 3, **changes}
    )


def test_an_index_tells_the_samples_without_reading(tmp_path, said):
    pattern = write_pairs(tmp_path, 20, 10)
    urls = [str(tmp_path / f"0000{number}.tar") for number in range(2)]
    write_index({url: describe_shard(url, samples, 0) for url, samples in zip(urls, (70, 30), strict=True)})
    check_data(config(pattern), ONE)
    assert "100 samples; schedule: 60 pairs (0.60 epochs of the data)" in said()


def test_a_stale_index_is_reported_and_counted_again(tmp_path, said):
    pattern = write_pairs(tmp_path, 20, 10)
    url = str(tmp_path / "00000.tar")
    write_index({url: describe_shard(url, 70, 0)})
    os.utime(url, ns=(1, 1))
    check_data(config(pattern), ONE)
    assert "20 samples" in said()
    assert "1 shards have changed since they were indexed" in said()


def test_statistics_of_a_download_count_too(tmp_path, said):
    pattern = write_pairs(tmp_path, 20, 10)
    for number in range(2):
        (tmp_path / f"0000{number}_stats.json").write_text(json.dumps({"successes": 40}))
    check_data(config(pattern), ONE)
    assert "80 samples" in said()


def test_more_readers_than_samples_are_refused(tmp_path):
    pattern = write_pairs(tmp_path, 5, 5)
    check_data(config(pattern, workers=5), ONE)
    message = r"1 shards of at most 5 samples cannot be shared by 1 processes x 6 workers; use workers=5"
    with pytest.raises(UserError, match=message):
        check_data(config(pattern, workers=6), ONE)
    with pytest.raises(UserError, match=r"3 processes x 2 workers; use workers=1"):
        check_data(config(pattern, workers=2, ngpus=3), ONE)
