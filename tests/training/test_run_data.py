"""Whole runs in this process: what they tell about the data they train on."""

import pytest

from llip.configs import Config
from llip.data.index import ShardEntry, write_index
from llip.errors import UserError
from llip.main import train
from llip.training.checkpoints.records import read_records
from tests.helpers import image_bytes, write_pairs, write_tar


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    return Config(
        name="run", logs=str(tmp_path / "logs"), train_data=write_pairs(tmp_path / "pairs", 16, 8),
        train_num_samples=16, model=tiny_model, mixture_tokens=2, pool_heads=4, batch_size=4, epochs=4,
        lr=1e-4, warmup=2, precision="fp32", workers=0, log_steps=2, save_frequency=2, report_to=(),
    )  # fmt: skip


def test_records_and_log_tell_what_was_used_and_dropped(config, tmp_path):
    bad = [{"png": b"x", "txt": b"x"}, {"png": image_bytes(1), "txt": b""}]
    fine = [{"png": image_bytes(i), "txt": b"a picture"} for i in range(6)]
    write_tar(tmp_path / "more" / "bad.tar", fine + bad)
    train_data = f"{config.train_data}@0.5::{tmp_path}/more/bad.tar@0.5"
    train(config.replace(train_data=train_data, max_bad_fraction=1.0), "cpu")
    records = read_records(config.folder / "metrics.jsonl")
    assert [sum(record["dataset_samples"]) for record in records] == [8 * i for i in range(1, 9)]
    last = records[-1]
    assert set(last["dropped"]) == {"not an image", "no caption"}
    assert sum(last["dropped"].values()) == last["dropped_samples"] > 4
    assert last["data_decode_seconds"] > 0
    assert last["worker_memory_mb"] > 10
    text = (config.folder / "log.txt").read_text()
    assert f"dropping from {tmp_path}/more/bad.tar: not an image" in text
    assert "samples dropped so far" in text
    assert "samples so far by dataset" in text


def test_the_slow_stage_is_logged(config, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.data_report.WAIT_WORTH_A_LINE", 0.0)
    train(config, "cpu")
    records = read_records(config.folder / "metrics.jsonl")
    named = [record["data_bottleneck"] for record in records]
    for record, stage in zip(records, named, strict=True):
        assert record[f"data_{stage}_seconds"] == max(
            record[f"data_{s}_seconds"] for s in ("read", "decode", "tokenize")
        )
    assert f"the slowest stage is {named[-1]}" in (config.folder / "log.txt").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_loses_most_of_its_shards_ends_and_names_them(config, tmp_path, workers):
    write_pairs(tmp_path / "lost", 32, 16)
    command = f"pipe:cat {tmp_path}/lost/{{00000..00009}}.tar"
    with pytest.raises(UserError) as caught:
        train(config.replace(train_data=command, workers=workers, train_num_samples=160), "cpu")
    assert "of 10 shards are lost" in str(caught.value)
    assert "max_bad_fraction = 0.1" in str(caught.value)
    assert "shard command failed: " in str(caught.value)
    assert f"cat {tmp_path}/lost/0000" in str(caught.value)


def test_lost_shards_and_their_samples_are_counted_apart(config, tmp_path):
    urls = [f"pipe:cat {tmp_path}/pairs/0000{number}.tar" for number in range(3)]
    write_pairs(tmp_path / "pairs", 24, 8)
    write_index({url: ShardEntry(8) for url in urls}, tmp_path / "pairs")
    (tmp_path / "pairs" / "00002.tar").unlink()
    command = f"pipe:cat {tmp_path}/pairs/{{00000..00002}}.tar"
    train(config.replace(train_data=command, max_bad_fraction=0.5), "cpu")
    last = read_records(config.folder / "metrics.jsonl")[-1]
    assert (last["dropped_samples"], last["dropped"]) == (0, {})
    assert last["lost_shards"] >= 1
    assert "samples dropped so far, 1 shards lost" in (config.folder / "log.txt").read_text()
