"""train_data: its forms, and the message of each mistake."""

import pytest

from llip.data.sources import check_shards_exist, parse_train_data
from llip.errors import UserError
from tests.helpers import write_pairs


def test_train_data_forms(tmp_path, monkeypatch):
    pattern = write_pairs(tmp_path / "a", 12, 4)
    write_pairs(tmp_path / "b", 4, 4)
    monkeypatch.setenv("DATA", str(tmp_path))
    assert [len(s.urls) for s in parse_train_data(pattern).sources] == [3]
    assert [len(s.urls) for s in parse_train_data(f"{tmp_path}/a/*.tar").sources] == [3]
    assert [len(s.urls) for s in parse_train_data("$DATA/a/00000.tar,${DATA}/b/00000.tar").sources] == [2]
    assert [len(s.urls) for s in parse_train_data("${NONE:-" + str(tmp_path) + "}/a/*.tar").sources] == [3]
    mixture = parse_train_data(f"{tmp_path}/a/*.tar@0.7::{tmp_path}/b/*.tar@0.3")
    assert [(len(s.urls), s.weight) for s in mixture.sources] == [(3, 0.7), (1, 0.3)]
    assert parse_train_data("pipe:cat {000..002}.tar").urls == tuple(f"pipe:cat 00{i}.tar" for i in range(3))


@pytest.mark.parametrize(
    ("train_data", "message"),
    [
        ("", "train_data is empty"),
        ("nowhere/*.tar", "matches no file"),
        ("nowhere/{00..03}.tar", "4 of 4 shards are missing"),
        ("s3://bucket/{0..1}.tar", "pipe:aws s3 cp"),
        ("a.tar@0::b.tar@0", "weights that are finite and not all 0"),
        ("a.tar@1e400::b.tar", "weights that are finite and not all 0"),
        ("d/{00000..00007.tar", "unbalanced braces"),
        ("http://host/{0..1.tar", "unbalanced braces"),
        ("{00000..99999999}.tar", "names 100,000,000 shards"),
        ("{0..9999}/{0..9999}.tar", "names 100,000,000 shards"),
        ("x" * 300 + ".tar", "cannot be read: File name too long"),
        ("a\0b.tar", r"'a\\x00b.tar' cannot be read: embedded null byte"),
        ("/tmp", r"'/tmp' is a folder; expected shards, for instance '/tmp/\*\.tar'"),
    ],
)
def test_bad_train_data(train_data, message):
    with pytest.raises(UserError, match=message):
        check_shards_exist(parse_train_data(train_data))


def test_zstd_is_answered_with_the_command(tmp_path):
    path = tmp_path / "0.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"0\.tar\.zst' is compressed with zstd; use 'pipe:zstd -dc .*0\.tar\.zst'"):
        check_shards_exist(parse_train_data(str(tmp_path / "*.zst")))


def test_a_loop_of_links_is_named(tmp_path):
    (tmp_path / "0.tar").symlink_to("0.tar")
    with pytest.raises(UserError, match=r"0\.tar' cannot be read: Too many levels of symbolic links"):
        check_shards_exist(parse_train_data(str(tmp_path / "0.tar")))


def test_empty_shards_are_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match=r"1 of 1 shards are empty files.*0\.tar"):
        check_shards_exist(parse_train_data(str(tmp_path / "0.tar")))
