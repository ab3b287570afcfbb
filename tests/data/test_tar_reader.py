"""One shard to raw samples: what is read, against tarfile and webdataset, and how each kind of damage is named."""

import gzip
import io
import os
import random
import tarfile
import tempfile
import time

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llip.data import tar_reader as reading
from llip.data.tar_reader import Damage, read_samples, split_name


def write_members(path, members, **options):
    """Write (name, bytes) members, or TarInfo objects without data, in their order."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def pairs(count, start=0):
    return [
        member
        for i in range(start, start + count)
        for member in ((f"{i:04d}.jpg", os.urandom(700 + 37 * i)), (f"{i:04d}.txt", b"caption %d" % i))
    ]


def keys(items):
    return [item["__key__"] for item in items if not isinstance(item, Damage)]


def damage(items):
    return [item.reason for item in items if isinstance(item, Damage)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, tar_format):
    long, accents = "folder/" * 13 + "n" * 90, "dossier/été"  # a long name and one that is not ASCII
    members = [*pairs(3), (f"{long}.JPG", b"J"), (f"{long}.txt", b"T"), (f"{accents}.seg.png", b"P"), *pairs(2, 5)]
    path = write_members(tmp_path / "a.tar", members, format=tar_format)
    samples = list(read_samples(path))
    assert samples == list(webdataset.tariterators.tarfile_samples([{"url": path}]))
    assert {suffix for sample in samples for suffix in sample} == {"__key__", "__url__", "jpg", "txt", "seg.png"}


def test_writers_with_fractions_of_seconds(tmp_path):
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path, mtime=1.25) as writer:  # every member gets a pax header
        for i in range(4):
            writer.write({"__key__": f"k{i}", "jpg": os.urandom(3000), "txt": "x"})
    assert list(read_samples(path)) == list(webdataset.tariterators.tarfile_samples([{"url": path}]))
    assert keys(read_samples(path)) == ["k0", "k1", "k2", "k3"]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_compressed_shards(tmp_path, mode, prefix):
    members = pairs(4)
    path = tmp_path / f"a.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples = list(read_samples(prefix + str(path)))
    assert [sample["jpg"] for sample in samples] == [data for name, data in members if name.endswith("jpg")]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x.y/a.seg.PNG", ("x.y/a", "seg.png")),
        ("./d/a.txt", ("./d/a", "txt")),
        ("d/._a.jpg", None),
        (".hidden", None),
        ("README", None),
        ("d.x/README", None),
        ("__meta__/a.json", None),
        ("__info__", None),
        ("__a.jpg", ("__a", "jpg")),
    ],
)
def test_names_to_keys(name, parts):
    assert split_name(name) == parts


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.tar"
    names = [b"\xe9t\xe9", b"\xe9t\xe8", b"\xe9" * 120]  # the last one needs a second header
    write_members(
        path,
        [(name.decode("latin-1") + ".jpg", name) for name in names],
        format=tarfile.GNU_FORMAT,
        encoding="latin-1",
    )
    samples = keys(read_samples(str(path)))
    assert len(set(samples)) == 3
    assert all(key.encode().isascii() for key in samples)


@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_any_changed_bytes_give_samples_or_damage(tmp_path, prefix):
    path = tmp_path / "a.tar"
    write_members(path, [(f"{'n' * (i % 3 * 60)}{i}.{s}", os.urandom(50 * i)) for i in range(12) for s in ("a", "b")])
    whole, good = path.read_bytes(), list(read_samples(str(path)))
    with tarfile.open(path) as tar:
        starts = [member.offset_data for member in tar if member.name.endswith(".a")]
    rng = random.Random(0)
    for _ in range(300 if not prefix else 20):
        data, where = bytearray(whole), rng.randrange(len(whole))
        for at in range(where, min(len(data), where + rng.choice([1, 8, 600]))):
            data[at] = rng.randrange(256)
        path.write_bytes(data)
        samples = list(read_samples(f"{prefix}{path}"))
        assert all(isinstance(item, Damage) or len(item) > 2 for item in samples)
        before = sum(start <= where for start in starts[1:])  # a sample is whole when the next one has begun
        kept = [{**item, "__url__": str(path)} for item in samples[:before]]
        assert kept == good[:before]


def test_members_that_are_no_samples_are_passed_over(tmp_path):
    folder, link = tarfile.TarInfo("folder.d"), tarfile.TarInfo("link.jpg")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "0000.jpg"
    hidden = [("._0000.jpg", b"finder"), ("__meta__/x.json", b"{}")]
    jpg, txt = pairs(1)
    path = write_members(tmp_path / "a.tar", [folder, jpg, *hidden, txt, link])
    assert list(read_samples(path)) == [{"__key__": "0000", "__url__": path, "jpg": jpg[1], "txt": txt[1]}]


@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
@pytest.mark.parametrize("skip", [0, 1, 3, 4, 9])
def test_skipping_counts_what_reading_yields(tmp_path, prefix, skip):
    twice = [("0009.jpg", b"1"), ("0009.jpg", b"2"), ("0009.txt", b"x")]  # not a sample, so not counted
    path = prefix + write_members(tmp_path / "a.tar", [*pairs(2), *twice, *pairs(2, 2)])
    whole, rest = list(read_samples(path)), list(read_samples(path, skip=skip))
    assert [item for item in rest if isinstance(item, dict)] == [item for item in whole if isinstance(item, dict)][
        skip:
    ]
    assert damage(rest) == damage(whole) == [reading.DUPLICATE]


def test_duplicate_names_the_member(tmp_path):
    path = write_members(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3")])
    samples = list(read_samples(path))
    assert samples == [Damage(path, reading.DUPLICATE, "a.JPG"), {"__key__": "b", "__url__": path, "jpg": b"3"}]


@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_truncation_at_every_block(tmp_path, prefix):
    members = [("a.jpg", b"x" * 600), ("a.txt", b"a"), ("b.jpg", b"y" * 512), ("b.txt", b"b")]
    whole = (tmp_path / "a.tar").with_name("whole.tar")
    write_members(whole, members)
    data = whole.read_bytes()
    ends = {"a": 512 + 1024 + 512 + 512, "b": 512 + 1024 + 512 + 512 + 512 + 512 + 512 + 512}
    for cut in range(100, ends["b"] + 512, 100 if not prefix else 700):
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        for skip in (0, 5):
            samples = list(read_samples(f"{prefix}{path}", skip=skip))
            assert damage(samples) == [reading.TRUNCATED if cut >= 512 else reading.NOT_A_TAR], cut
            # a sample counts as whole once the header of the next has been seen
            assert keys(samples) == ([] if skip else ["a"] * (cut >= ends["a"] + 512)), cut
    assert keys(read_samples(str(whole))) == ["a", "b"]


def test_padding_lost_at_the_end_of_data(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, [("a.jpg", b"x" * 600)])
    path.write_bytes(path.read_bytes()[: 512 + 599])
    for skip in (0, 1):
        assert damage(read_samples(str(path), skip=skip)) == [reading.TRUNCATED]


def test_damaged_header_ends_the_shard_only(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, [("a.jpg", b"x"), ("b.jpg", b"y"), ("c.jpg", b"z")])
    data = bytearray(path.read_bytes())
    data[1024 * 2 + 3] ^= 0xFF  # in the name of the third member
    path.write_bytes(data)
    samples = list(read_samples(str(path)))
    assert keys(samples) == ["a"]  # b may have had more members
    assert damage(samples) == [reading.BAD_HEADER]


NOISE = random.Random(0).randbytes(20_000)
NO_TARS = {
    "empty": (b"", reading.ZERO_BYTES),
    "short page": (b"<html>not found</html>", reading.NOT_A_TAR),
    "long page": (b"<html>" * 1000, reading.NOT_A_TAR),
    "noise": (NOISE[:4096], reading.NOT_A_TAR),
    "gzip": (gzip.compress(NOISE[:100]), reading.NOT_A_TAR),
    "cut gzip": (gzip.compress(NOISE)[:9000], reading.NOT_A_TAR),
    "damaged gzip": (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 500, reading.UNREADABLE),
}


@pytest.mark.parametrize(("content", "reason"), NO_TARS.values(), ids=NO_TARS)
@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_what_is_no_tar(tmp_path, content, reason, prefix):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert damage(read_samples(f"{prefix}{path}")) == [reason]


def test_cut_gzip(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, pairs(30))
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    samples = list(read_samples(str(path)))
    assert damage(samples) == [reading.TRUNCATED]
    assert 5 < len(keys(samples)) < 25


def test_shards_that_cannot_be_opened(tmp_path):
    assert damage(read_samples(str(tmp_path / "none.tar"))) == [reading.MISSING]
    assert damage(read_samples(str(tmp_path))) == [reading.UNREADABLE]  # a folder
    assert damage(read_samples("nosuch5://host/a.tar")) == [reading.MISSING]
    assert damage(read_samples((tmp_path / "none.tar").as_uri())) == [reading.MISSING]  # opened by webdataset


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, [(f"{i:03d}.jpg", os.urandom(100_000)) for i in range(20)])
    items = read_samples(str(path))
    samples = [next(items)]
    os.truncate(path, 700_000)
    samples += items
    assert keys(samples) == [f"{i:03d}" for i in range(len(samples) - 1)]
    assert damage(samples) == [reading.TRUNCATED]


@pytest.mark.parametrize(
    ("command", "count", "detail"),
    [
        ("cat {path}; exit 3", 50, "exit code 3"),  # all of it came, and yet
        ("head -c 20000 {path}; exit 4", None, "exit code 4"),  # the reason, not its consequence
        ("exit 5", 0, "exit code 5"),
        ("cat {path}.nowhere 2>/dev/null", 0, "exit code 1"),
        ("echo no such bucket; exit 6", 0, "exit code 6"),
    ],
)
def test_commands_that_fail(tmp_path, command, count, detail):
    path = write_members(tmp_path / "a.tar", pairs(50))
    samples = list(read_samples("pipe:" + command.format(path=path)))
    assert samples[-1] == Damage(samples[-1].url, reading.COMMAND_FAILED, detail)
    assert len(damage(samples)) == 1
    assert len(keys(samples)) == count if count is not None else 5 < len(keys(samples)) < 25


@pytest.mark.slow
def test_leaving_a_command_ends_it_and_its_children(tmp_path):
    path, mark = write_members(tmp_path / "a.tar", pairs(3)), tmp_path / "mark"
    items = read_samples(f"pipe:(cat {path}; sleep 1; touch {mark}) | cat; true")
    assert next(items)["__key__"] == "0000"
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 0.9
    time.sleep(1.5)
    assert not mark.exists()


KEYS = st.text("abé_-0 ", min_size=1, max_size=60).map(lambda text: f"k{text}")
FOLDERS = st.sampled_from(["", "train/", "./a/b/", "v1.0/", "long/" * 30])
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "txt", "json", "seg.png", "a"]), st.binary(max_size=1500), min_size=1)
SAMPLES = st.lists(st.tuples(FOLDERS, KEYS, MEMBERS), max_size=6, unique_by=lambda sample: sample[:2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SAMPLES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans())
def test_random_archives_are_read_as_webdataset_reads_them(samples, tar_format, upper):
    members = [
        (f"{folder}{key}.{suffix.upper() if upper else suffix}", data)
        for folder, key, parts in samples
        for suffix, data in parts.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_members(f"{folder}/a.tar", members, format=tar_format)
        expected = list(webdataset.tariterators.tarfile_samples([{"url": path}]))
        assert len(expected) == len(samples)
        for skip in (0, 2):
            assert list(read_samples(path, skip)) == expected[skip:]


def header(name, count=5, kind=b"0", **fields):
    """One header block, with raw bytes where tarfile would not write them."""
    info = tarfile.TarInfo(name)
    info.size, info.type = count, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    for field, value in fields.items():
        start = {"size": 124, "magic": 257, "prefix": 345}[field]
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data=b"12345", **fields):
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pax(**records):
    lines = [f" {key.replace('__', '.')}={value}\n" for key, value in records.items()]
    return member("pax", "".join(f"{len(line) + 2}{line}" for line in lines).encode(), kind=b"x")


A, END = member("a.jpg") + member("a.txt"), bytes(1024)
MINUS_512 = b"\xff" * 10 + b"\xfe\x00"


@pytest.mark.parametrize(
    ("content", "keys_read", "reasons"),
    [
        (END, [], []),
        (A + bytes(512), ["a"], []),
        (A, [], [reading.TRUNCATED]),
        (A + END + os.urandom(2000), ["a"], []),
        (A + header("b.jpg", 0) + END, ["a", "b"], []),
        (A + member("b.jpg", prefix=b"folder", magic=b"ustar\x0000") + END, ["a", "folder/b"], []),
        (A + member("b.jpg", magic=bytes(8)) + END, ["a", "b"], []),
        (A + member("b.jpg", kind=b"7") + member("c.jpg", kind=b"Q") + END, ["a", "b"], []),
        (A + header("b.jpg", 5, b"1") + header("c.jpg", 0, b"6") + member("d.jpg") + END, ["a", "d"], []),
        (A + member("b.jpg", size=b"\x80" + (5).to_bytes(11, "big")) + END, ["a", "b"], []),
        (A + member("b.jpg", size=b"         5  ") + END, ["a", "b"], []),
        (A + header("b.jpg", size=MINUS_512) + member("c.jpg") + END, ["a"], [reading.BAD_HEADER]),
        (A + header("b.jpg", size=b"zz999zzzzzzz") + END, [], [reading.BAD_HEADER]),
        (A + header("b.jpg", size=b"\x80" + (2**60).to_bytes(11, "big")) + END, [], [reading.TRUNCATED]),
        (A + pax(path="long/b.jpg") + member("b.jpg") + END, ["a", "long/b"], []),
        (A + pax(comment="b") + member("b.jpg") + END, ["a", "b"], []),
        (A + pax(size="5") + header("b.jpg", 0) + b"12345" + bytes(507) + END, ["a", "b"], []),
        (A + pax(path="b.jpg") + END, [], [reading.BAD_HEADER]),
        (A + pax(path="b.jpg"), [], [reading.TRUNCATED]),
        (A + member("L", b"long/b.jpg", kind=b"L") * 3000 + member("b.jpg") + END, [], [reading.BAD_HEADER]),
        (A + pax(GNU__sparse__major=1, GNU__sparse__minor=0) + member("b.jpg", b"9\n"), [], [reading.TRUNCATED]),
        (A + pax(GNU__sparse__map="x,y") + member("b.jpg") + END, [], [reading.BAD_HEADER]),
    ],
)
def test_odd_archives(tmp_path, content, keys_read, reasons):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    for url in (str(path), f"pipe:cat {path}"):
        items = list(read_samples(url))
        assert (keys(items), damage(items)) == (keys_read, reasons)
