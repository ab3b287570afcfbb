"""The index of sample counts: when it is believed, and when not."""

import json
import logging
import os

import pytest

from llip.data.index import (
    INDEX_NAME,
    ShardEntry,
    describe_shard,
    load_index,
    write_index,
)
from llip.errors import UserError
from tests.helpers import write_tar


def shards(folder, count=3):
    return [str(write_tar(folder / f"{i:05d}.tar", [{"txt": b"x"}] * (i + 1))) for i in range(count)]


def entries(urls):
    return {url: describe_shard(url, samples=i + 1, damaged=0) for i, url in enumerate(urls)}


def test_what_is_written_is_read(tmp_path):
    urls = shards(tmp_path)
    assert write_index(entries(urls)) == [tmp_path / INDEX_NAME]
    assert load_index(urls) == dict(zip(urls, (1, 2, 3), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", INDEX_NAME]
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    size = (tmp_path / "00001.tar").stat().st_size
    assert content["shards"]["00001.tar"].items() >= {"samples": 2, "damaged": 0, "bytes": size}.items()


def test_an_index_follows_its_folder(tmp_path, monkeypatch):
    urls = shards(tmp_path / "a")
    write_index(entries(urls))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert load_index(["b/00000.tar", "b/00002.tar"]) == {"b/00000.tar": 1, "b/00002.tar": 3}


def test_changed_shards_are_stale(tmp_path, caplog):
    urls = shards(tmp_path, 4)
    write_index(entries(urls))
    write_tar(tmp_path / "00000.tar", [{"txt": b"x"}] * 50)  # another size
    os.utime(urls[1], ns=(1, 1))  # another time
    os.unlink(urls[2])
    with caplog.at_level(logging.WARNING):
        assert load_index(urls) == {urls[3]: 4}
    assert f"3 shards have changed since they were indexed, the first is {urls[0]}" in caplog.text


def test_later_writes_keep_other_entries(tmp_path):
    urls = shards(tmp_path)
    write_index(entries(urls[:1]))
    write_index({urls[1]: describe_shard(urls[1], 7, 2)})
    assert load_index(urls) == {urls[0]: 1, urls[1]: 7}


def test_one_folder_serves_several_datasets(tmp_path):
    one, two = shards(tmp_path / "a"), shards(tmp_path / "b")
    remote = "pipe:cat 00000.tar"
    known = {one[0]: describe_shard(one[0], 5, 0), two[0]: describe_shard(two[0], 6, 0), remote: ShardEntry(8)}
    assert write_index(known, tmp_path / "new" / "folder") == [tmp_path / "new" / "folder" / INDEX_NAME]
    write_index(entries(one[1:2]))  # beside the shards: is used too
    assert load_index([*one, *two, remote], tmp_path / "new" / "folder") == {
        one[0]: 5,
        two[0]: 6,
        remote: 8,
        one[1]: 1,
    }
    assert load_index([one[0], remote]) == {}


def test_remote_shards_need_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"'pipe:cat a.tar' is not on this machine.*--index-dir"):
        write_index({"pipe:cat a.tar": ShardEntry(3)})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"index: cannot write .*file.*--index-dir"):
        write_index({"pipe:x": ShardEntry(3)}, tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"version": 2, "shards": {}}',
        b'{"version": 1, "shards": []}',
        b"[" * 100_000,
        b'{"version": 1, "shards": {"00000.tar": 3}}',
        b'{"version": 1, "shards": {"00000.tar": {"samples": -1}}}',
        b'{"version": 1, "shards": {"00000.tar": {"samples": true}}}',
        b'{"version": 1, "shards": {"00000.tar": {"samples": 3, "other": 1}}}',
    ],
)
def test_other_content_counts_as_none_and_is_named(tmp_path, content, caplog):
    (url,) = shards(tmp_path, 1)
    (tmp_path / INDEX_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_index([url]) == {}
    assert str(tmp_path / INDEX_NAME) in caplog.text


def test_img2dataset_statistics_serve_where_no_index_does(tmp_path, caplog):
    urls = shards(tmp_path, 4)
    for i in (0, 1):
        (tmp_path / f"{i:05d}_stats.json").write_text(json.dumps({"count": 99, "successes": 90 + i, "duration": 1.5}))
    (tmp_path / "00002_stats.json").write_text('{"successes": "many"}')
    write_index(entries(urls[:1]))
    with caplog.at_level(logging.WARNING):
        assert load_index(urls) == {urls[0]: 1, urls[1]: 91}
    assert "00002_stats.json" in caplog.text


def test_ten_thousand_shards(tmp_path):
    urls = []
    for i in range(10_000):
        urls.append(str(tmp_path / f"{i:05d}.tar"))
        os.close(os.open(urls[-1], os.O_CREAT))
    write_index({url: describe_shard(url, i, 0) for i, url in enumerate(urls)})
    assert load_index(urls) == {url: i for i, url in enumerate(urls)}
