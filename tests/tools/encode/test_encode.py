"""Frozen features: a run that reads them has the samples, captions and losses of the run that reads images."""

import errno
import itertools
import json
import os
import shutil
from collections import Counter

import pytest
import torch

from llip.data.features.cache import cached_data
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data, shard_name
from llip.errors import RunError, UserError
from llip.main import train
from llip.open_clip.factory import model_spec, spec_tokenizer
from llip.open_clip.towers.text import frozen_text_features
from llip.system.locks import held_lock
from llip.system.processes import Processes
from llip.tools.encode import encode as encoding
from llip.tools.encode import shard
from llip.tools.encode.__main__ import main
from llip.tools.encode.encode import LOCK, encode
from llip.training.setup import build_run, check_data, start_model
from tests.helpers import TINY_MODEL, config_file, image_bytes, tiny_run, write_captioned, write_pairs, write_tar

LOCKED = {"image_crop": "center", "lock_image": True, "mixture_tokens": 1, "caption_keys": "json.c:0.6,txt:0.4"}


def sample(number, **members):
    captions = [f"caption {j} of {number}" for j in range(1 + number % 3)]
    json_member = json.dumps({"c": captions, "other": 1}).encode()
    return {"png": image_bytes(number), "txt": b"text of %d" % number, "json": json_member} | members


def write_damaged(folder):
    """Two datasets with shards of the same names; some samples have no image, no caption, or are damaged."""
    good = [sample(i) for i in range(40)]
    good[3] = sample(3, png=b"junk")
    good[7] = {"txt": b"no image"}
    good[12] = {"png": image_bytes(12), "json": b"{}"}
    good[20] = sample(20, png=image_bytes(20)[:100])
    for number, (dataset, first, last) in enumerate((("a", 0, 9), ("a", 9, 15), ("a", 15, 24), ("b", 24, 40))):
        write_tar(folder / dataset / f"{number % 3:05d}.tar", good[first:last], [f"k{i}" for i in range(first, last)])
    return f"{folder}/a/*.tar@0.7::{folder}/b/*.tar@0.3"


def batches_of(config, count, *, workers=0, rank=0, processes=1, position=None):
    """The first batches of a process, from the cache where the config names one."""
    config = config.replace(workers=workers)
    data, spec = parse_train_data(config.train_data), model_spec(config)
    data = data if config.feature_cache is None else cached_data(config, data)
    position = position or DataPosition(workers)
    images = CaptionedImages(config, data, spec_tokenizer(spec), spec.image_size, position, rank, processes)
    batches = list(itertools.islice(iter(make_loader(images, pin=False)), count))
    assert not any(batch.error for batch in batches), [batch.error for batch in batches]
    return batches


def dropped(batches):
    counts = Counter()
    for batch in batches:
        for url, reason, count in batch.report.dropped:
            counts[shard_name(url), reason] += count
    return counts


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A config over damaged shards, and the same with its features."""
    folder = tmp_path_factory.mktemp("damaged")
    config = tiny_run(
        folder, train_data=write_damaged(folder), **LOCKED, lock_text="encoder", captions_per_image=2, batch_size=4,
        shuffle_buffer=5, max_bad_fraction=1.0,
    )  # fmt: skip
    assert encode(config, folder / "cache", "fp16").dropped == {
        "not an image": 1, "no image": 1, "no caption": 1, "truncated image": 1
    }  # fmt: skip
    return config, config.replace(feature_cache=str(folder / "cache"))


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (1, 2)])
def test_samples_captions_and_what_is_dropped_are_those_of_the_images(damaged, workers, processes):
    for rank in range(processes):
        place = {"workers": workers, "rank": rank, "processes": processes}
        pictures, features = (batches_of(config, 12, **place) for config in damaged)
        assert [batch.ids for batch in features] == [batch.ids for batch in pictures]
        assert all(map(torch.equal, (b.mask for b in features), (b.mask for b in pictures)))
        assert dropped(features) == dropped(pictures)
        assert [batch.cursor for batch in features] == [batch.cursor for batch in pictures]


def test_a_position_in_the_middle_is_that_of_the_images(damaged):
    pictures = batches_of(damaged[0], 9)
    position = DataPosition(0)
    for batch in pictures[:4]:
        position.advance(batch.cursor)
    assert [b.ids for b in batches_of(damaged[1], 5, position=position)] == [b.ids for b in pictures[4:]]


@pytest.mark.parametrize("lock_text", ["encoder", False])
def test_features_are_what_the_frozen_towers_give_for_the_pixels_and_tokens(damaged, lock_text):
    config, cached = (each.replace(lock_text=lock_text) for each in damaged)
    model = start_model(config, model_spec(config), None, torch.device("cpu")).eval()
    for picture, feature in zip(batches_of(config, 5), batches_of(cached, 5), strict=True):
        with torch.no_grad():
            expected = model.visual.frozen_features(model.normalise(picture.images))
        torch.testing.assert_close(feature.images.float(), expected, rtol=1e-3, atol=1e-3)
        if not lock_text:
            assert torch.equal(feature.tokens, picture.tokens)
            continue
        with torch.no_grad():
            expected = frozen_text_features(model.text, picture.tokens.flatten(0, 1)).unflatten(0, (4, 2))
        torch.testing.assert_close(feature.tokens.float(), expected, rtol=1e-3, atol=1e-3)


def losses(config):
    values = []
    train(config, "cpu", on_step=lambda result: values.append(result.loss.item()))
    return torch.tensor(values, dtype=torch.float64)


def sample_log(config):
    return (config.folder / "sample_ids" / "process_0.jsonl").read_text()


BACKBONE = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_efficientnet", "image_size": 64},
    "mixture_head": {"blocks": 1, "width": 16, "heads": 2, "grid": 2, "dropout": 0.1},
    "text_cfg": TINY_MODEL["text_cfg"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a frozen backbone and a frozen text encoder with two captions per image, and its losses."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "backbone.json").write_text(json.dumps(BACKBONE))
    config = tiny_run(
        folder, model=str(folder / "backbone.json"), train_data=write_captioned(folder / "pairs", 32, 16),
        caption_keys="json.captions", captions_per_image=2, image_crop="center", lock_image="backbone",
        lock_text="encoder", batch_size=8, accum_freq=2, log_sample_ids=True, epochs=2,
    )  # fmt: skip
    return config, losses(config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_losses_are_those_of_the_images(run, dtype, tmp_path):
    config, expected = run
    encode(config, tmp_path, dtype)
    cached = config.replace(name=dtype, feature_cache=str(tmp_path))
    assert ((losses(cached) - expected).abs() < 1e-3 * expected).all()
    assert sample_log(cached) == sample_log(config)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config over two shards with a frozen tower, and the same with its features."""
    folder = tmp_path_factory.mktemp("small")
    config = tiny_run(folder, train_data=write_pairs(folder / "pairs", 32, 16), **LOCKED | {"caption_keys": "txt"})
    encode(config, folder / "cache", "fp16")
    return config, config.replace(feature_cache=str(folder / "cache"))


@pytest.fixture
def copies(small, tmp_path):
    """As `small`, in copies of data and features that a test may change."""
    config, cached = small
    shutil.copytree(cached.feature_cache, tmp_path / "cache")
    shutil.copytree(os.path.dirname(config.train_data), tmp_path / "pairs")  # with another time
    data = f"{tmp_path}/pairs/*.tar"
    return config.replace(train_data=data), cached.replace(train_data=data, feature_cache=str(tmp_path / "cache"))


def started(config):
    config.folder.mkdir(parents=True, exist_ok=True)
    return build_run(config, check_data(config, Processes()), Processes())


def edit_shard(path, position, data):
    """Write into the middle of a file, which keeps its size."""
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def edit_manifest(folder, name, value):
    content = json.loads((folder / "manifest.json").read_text())
    content["made_with"][name] = value
    (folder / "manifest.json").write_text(json.dumps(content))


def test_moved_data_are_the_same(copies):
    started(copies[1])


MISTAKES = {
    "no folder": (lambda folder: shutil.rmtree(folder / "cache"), {}, "is not there; write it with: llip encode"),
    "no manifest": (lambda folder: (folder / "cache/manifest.json").unlink(), {}, "has no manifest.json"),
    "manifest": (lambda folder: (folder / "cache/manifest.json").write_text("{"), {}, "manifest.json cannot be read"),
    "missing shard": (lambda folder: (folder / "cache/00001.tar").unlink(), {}, "00001.tar has 0 bytes"),
    "truncated": (lambda folder: os.truncate(folder / "cache/00001.tar", 5000), {}, "5,000 bytes, .* when"),
    "unfinished": (lambda folder: (folder / "cache/shards.jsonl").write_text(""), {}, "lacks 2 of the 2 shards"),
    "other data": (lambda folder: edit_shard(folder / "pairs/00000.tar", 600, b"other"), {}, "other bytes than then"),
    "longer data": (lambda folder: os.truncate(folder / "pairs/00000.tar", 90_000), {}, "bytes then, 90,000 now"),
    "weights": (lambda folder: None, {"seed": 4}, "made with another image weights"),
    "size": (lambda folder: None, {"image_size": 48}, "made with another image_size: 32 then, 48 now"),
    "resize": (lambda folder: edit_manifest(folder / "cache", "resize_mode", "squash"), {}, "another resize_mode"),
    "captions": (lambda folder: None, {"caption_keys": "txt,json.c"}, "captions: .'txt'. then, .'json.c', 'txt'. now"),
    "crop": (lambda folder: None, {"image_crop": "random"}, "set image_crop=center"),
    "unlocked": (lambda folder: None, {"lock_image": False}, "lock_image = False; set lock_image=backbone"),
    "tokens": (lambda folder: None, {"mixture_tokens": 4}, "the first is 'class_embedding'"),
    "transform": (lambda folder: None, {"image_transform": "a.py:f"}, "image_transform"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_run_refuses_features_that_are_not_its_own(copies, tmp_path, name):
    change, fields, message = MISTAKES[name]
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        started(copies[1].replace(**fields))


def test_text_features_need_the_same_tokenizer_and_captions_as_they_are(damaged):
    cached = damaged[1]
    for fields, message in (({"context_length": 11}, "another text.context_length"), ({"caption_sentences": 2}, "=0")):
        with pytest.raises(UserError, match=message):
            started(cached.replace(**fields))
    started(cached.replace(context_length=11, lock_text=False))  # tokens are made as ever


def test_an_interrupted_encoder_continues_and_writes_what_one_run_writes(copies, tmp_path, monkeypatch):
    config, cached = copies
    folder, images = tmp_path / "parts", itertools.count()
    write = shard.write_features

    def interrupted(*arguments):
        if next(images) == 20:  # in the second shard
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(shard, "write_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config, folder, "fp16")
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "00000.tar", "manifest.json", "shards.jsonl"]
    (folder / "00001.tar.0a1b2c3d.tmp").write_text("of an encoder that was killed")
    with open(folder / "shards.jsonl", "a") as file:
        file.write('{"file": "00001.t')
    assert encode(config, folder, "fp16").new == 16
    assert not list(folder.glob("*.tmp"))
    for name in ("00000.tar", "00001.tar"):
        assert (folder / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()
    assert encode(config, folder, "fp16").new == 0
    started(cached.replace(feature_cache=str(folder)))


def test_only_what_changed_is_encoded_again(copies, tmp_path):
    config, cached = copies
    write_tar(tmp_path / "pairs/00001.tar", [{"png": image_bytes(99), "txt": b"picture number 99 of all"}] * 16)
    os.truncate(tmp_path / "cache/00000.tar", 5000)
    with pytest.raises(UserError, match="run `llip encode`"):
        started(cached)
    assert encode(config, tmp_path / "cache", "fp16").new == 32
    started(cached)
    (tmp_path / "pairs/00000.tar").touch()
    assert encode(config, tmp_path / "cache", "fp16").new == 0


def test_a_source_that_changes_while_it_is_read_is_no_features(copies, tmp_path, monkeypatch):
    write = shard.write_features

    def changing(*arguments):
        os.truncate(tmp_path / "pairs/00000.tar", 90_000)
        return write(*arguments)

    monkeypatch.setattr(shard, "write_features", changing)
    with pytest.raises(UserError, match=r"00000.tar' changed while it was read: .* 90,000 now"):
        encode(copies[0], tmp_path / "new", "fp16")
    assert not list((tmp_path / "new").glob("*.tar*"))


def test_a_folder_of_other_features_or_files_is_left_alone(copies, tmp_path, monkeypatch):
    config, cached = copies
    monkeypatch.setattr(encoding, "_LOCK_PATIENCE", 0)
    for arguments, message in (
        ((config, tmp_path / "cache", "int8"), "another dtype: 'fp16' then, 'int8' now"),
        ((config.replace(seed=4), tmp_path / "cache", "fp16"), "another image weights"),
        ((config, tmp_path / "pairs", "fp16"), "holds '00000.tar' and is no feature cache"),
    ):
        with pytest.raises(UserError, match=message):
            encode(*arguments)
    with held_lock(tmp_path / "cache" / LOCK, "it", "", 0), pytest.raises(UserError, match="in use by process"):
        encode(config, tmp_path / "cache", "fp16")
    started(cached)


def test_room_is_checked_before_and_a_full_disk_keeps_what_is_finished(copies, tmp_path, monkeypatch):
    config, write = copies[0], shard.write_features
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"the features take about 0.00 GiB, and 0.00 GiB are free; make room"):
        encode(config, tmp_path / "new", "fp16")
    monkeypatch.undo()

    def full(name, features, dtype):
        if (tmp_path / "new" / "00000.tar").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(name, features, dtype)

    monkeypatch.setattr(shard, "write_features", full)
    with pytest.raises(RunError, match=r"No space left on device: .*00001.tar'; make room"):
        encode(config, tmp_path / "new", "fp16")
    monkeypatch.undo()
    assert encode(config, tmp_path / "new", "fp16").new == 16


def test_numbers_that_do_not_fit_name_the_type_to_choose(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "fits", lambda features, dtype: False)
    with pytest.raises(UserError, match="which fp16 does not hold; encode with --dtype bf16"):
        encode(copies[0], tmp_path / "new", "fp16")


def test_the_program_names_the_command_and_fails_where_a_shard_cannot_be_read(copies, tmp_path, capsys):
    first = f"pipe:cat {tmp_path}/pairs/00000.tar"
    config = copies[0].replace(train_data=f"{first}::pipe:cat {tmp_path}/late/00001.tar")
    arguments = [config_file(tmp_path / "c.py", config), "--out", str(tmp_path / "new"), "--json"]
    assert main(arguments) == 3
    captured = capsys.readouterr()
    assert "1 shards could not be read, the first is 'pipe:cat" in captured.err
    assert json.loads(captured.out)["samples"] == 16
    os.rename(tmp_path / "pairs", tmp_path / "late")
    os.symlink(tmp_path / "late", tmp_path / "pairs")
    assert main(arguments) == 0
    encoded = json.loads(capsys.readouterr().out)
    assert encoded["new"] == 16
    assert encoded["command"] == f"llip train {arguments[0]} feature_cache={tmp_path}/new"
    with pytest.raises(SystemExit):
        main([arguments[0]])
    assert main([arguments[0], "lock_image=false", "--out", str(tmp_path / "other")]) == 2
