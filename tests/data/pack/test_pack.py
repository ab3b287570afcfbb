"""Packing: what goes into the shards (read with tarfile), what is dropped and why, and that it is the same again."""

import io
import json
import shlex
import tarfile
from collections import Counter

import pytest
from PIL import Image

from llip.cli import parse_command
from llip.data.index import load_index
from llip.data.pack.__main__ import main
from tests.helpers import image_bytes


def members(folder):
    """Everything in the shards of a folder: {shard: [(name, bytes)]}."""
    shards = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            shards[path.name] = [(member.name, tar.extractfile(member).read()) for member in tar]
    return shards


def samples(folder):
    """The samples of a folder's shards: [{suffix: bytes}]."""
    by_key = {}
    for content in members(folder).values():
        for name, data in content:
            key, _, suffix = name.partition(".")
            by_key.setdefault(key, {})[suffix] = data
    return list(by_key.values())


def picture(kind, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder, count):
    for i in range(count):
        path = folder / f"class {i % 3}" / f"été #{i}.v2.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i))
        path.with_suffix(".txt").write_text(f" caption {i} \n", encoding="utf-8")
    return folder


def run(capsys, *arguments):
    """Pack with --json and return the document."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err[err.index("error: ") :]  # behind the progress bar


def test_a_folder(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in", 23), tmp_path / "out"
    packed = run(capsys, source, "--out", out, "--per-shard", 10)
    shards = members(out)
    assert list(shards) == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(len(content) // 2 for content in shards.values()) == [7, 8, 8]  # even, not 10, 10, 3
    expected = {(image_bytes(i), b"caption %d" % i) for i in range(23)}
    assert {(sample["png"], sample["txt"]) for sample in samples(out)} == expected
    names = [name for content in shards.values() for name, _ in content]
    assert len(set(names)) == 46
    assert all(name.isascii() and name.count(".") == 1 and " " not in name for name in names)
    assert packed["train_data"] == f"{out}/{{00000..00002}}.tar"
    assert (packed["train_num_samples"], packed["caption_keys"], packed["dropped"]) == (23, "txt", {})
    assert packed["shards"] == {f"{out}/{name}": len(content) // 2 for name, content in shards.items()}
    assert load_index(list(packed["shards"])) == packed["shards"]
    assert sorted(path.name for path in out.iterdir()) == [*shards, "llip-index.json"]


def test_the_printed_command_is_one(tmp_path, capsys):
    source = write_folder(tmp_path / "in", 5)
    assert main([str(source), "--out", str(tmp_path / "my out")]) == 0
    text = capsys.readouterr().out
    assert "packed 5 samples into 1 shards" in text
    words = shlex.split(text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "llip.main"]
    config = parse_command(words[3:]).config
    assert (config.train_data, config.train_num_samples) == (f"{tmp_path}/my out/00000.tar", 5)
    assert config.steps_per_epoch == 1
    assert config.processes == 1


def test_same_arguments_same_bytes(tmp_path, capsys):
    source = write_folder(tmp_path / "in", 12)
    for name, options in {"a": [], "b": [], "seed": ["--seed", 1], "sorted": ["--no-shuffle"]}.items():
        run(capsys, source, "--out", tmp_path / name, "--per-shard", 5, *options)
    bytes_of = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))]
        for name in ("a", "b", "seed", "sorted")
    }
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["seed"]
    order = [int(sample["txt"].split()[1]) for sample in samples(tmp_path / "sorted")]
    assert order == [*(i for k in range(3) for i in sorted(range(k, 12, 3), key=str))]
    assert [int(sample["txt"].split()[1]) for sample in samples(tmp_path / "a")] != order


def test_json_beside_images(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for i, record in enumerate([{"captions": ["a", "b", "a", " "]}, {"Caption": "c", "url": "x"}, {"text": ["d"]}]):
        (source / f"{i}.jpg").write_bytes(image_bytes(i, suffix="jpg"))
        (source / f"{i}.json").write_text(json.dumps(record))
    (source / "2.txt").write_text("e")  # beside its json
    packed = run(capsys, source, "--out", tmp_path / "out", "--no-shuffle")
    assert packed["caption_keys"] == "json.captions"
    assert [json.loads(s["json"])["captions"] for s in samples(tmp_path / "out")] == [["a", "b"], ["c"], ["e", "d"]]
    assert all(s.keys() == {"jpg", "json"} for s in samples(tmp_path / "out"))


def test_what_is_dropped_is_counted_and_named(tmp_path, capsys):
    source = write_folder(tmp_path / "in", 2)
    bad = {
        "alone.jpg": (image_bytes(5, suffix="jpg"), None),
        "blank.jpg": (image_bytes(6, suffix="jpg"), b" \n"),
        "latin.jpg": (image_bytes(7, suffix="jpg"), "é".encode("latin-1")),
        "text.jpg": (b"<html>", b"x"),
        "hidden_gif.jpg": (picture("GIF"), b"x"),
        "a.gif": (picture("GIF"), b"x"),
        "b.TIFF": (picture("TIFF"), b"x"),
    }
    for name, (image, caption) in bad.items():
        (source / name).write_bytes(image)
        if caption is not None:
            (source / name).with_suffix(".txt").write_bytes(caption)
    (source / "really_png.jpg").write_bytes(image_bytes(8))
    (source / "really_png.txt").write_text("x")
    packed = run(capsys, source, "--out", tmp_path / "out")
    assert packed["dropped"] == {
        "no caption": 2,
        "caption is not UTF-8": 1,
        "not an image": 1,
        "format gif is not packed": 2,
        "format tiff is not packed": 1,
    }
    assert packed["examples"]["not an image"].endswith("text.jpg")
    assert packed["train_num_samples"] == 3
    assert {"png": image_bytes(8), "txt": b"x"} in samples(tmp_path / "out")  # named by what it is


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.csv", "image,caption\n{0},one\n{1},two\n", []),
        ("a.csv", "\ufefffilepath\ttitle\n{0}\tone\n{1}\ttwo\n", []),  # OpenCLIP's: tabs in a .csv, from a spreadsheet
        ("a.tsv", "x\tFile\tText\n1\t{0}\tone\n2\t{1}\ttwo\n", []),
        (
            "a.csv",
            'where,what,image\n{0},"one",9\n{1},two,9\n',
            ["--image-column", "where", "--caption-column", "what"],
        ),
        ("a.jsonl", '{{"image": "{0}", "caption": "one"}}\n\n{{"image": "{1}", "caption": "two"}}\n', []),
    ],
)
def test_tables(tmp_path, capsys, name, text, options):
    for i in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i))
    (tmp_path / name).write_text(text.format("images/0.png", "images/1.png"), encoding="utf-8")
    packed = run(capsys, tmp_path / name, "--out", tmp_path / "out", "--no-shuffle", *options)
    assert packed["caption_keys"] == "txt"
    assert samples(tmp_path / "out") == [
        {"png": image_bytes(0), "txt": b"one"},
        {"png": image_bytes(1), "txt": b"two"},
    ]


def test_rows_of_one_image_become_its_captions(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i))
    rows = ["1.png,b", '0.png,"two, lines\nof it"', "1.png,a", "1.png,b"]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *rows]))
    root = ["--image-root", tmp_path / "images"]
    packed = run(capsys, tmp_path / "a.csv", "--out", tmp_path / "out", "--no-shuffle", *root)
    assert (packed["caption_keys"], packed["train_num_samples"]) == ("json.captions", 2)
    packed = [(sample["png"], json.loads(sample["json"])["captions"]) for sample in samples(tmp_path / "out")]
    assert packed == [(image_bytes(1), ["b", "a"]), (image_bytes(0), ["two, lines\nof it"])]


def test_bad_lines_are_counted(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(image_bytes(0))
    lines = [
        {"version": 1},
        {"image": "0.png", "caption": ["one", "uno"]},
        {"image": "none.png", "caption": "x"},
        {"image": "https://host/a.png", "caption": "x"},
        {"image": "", "caption": "x"},
        {"image": "0.png", "caption": 3},
        {"image": "0.png"},
        {"image": "a\0.png", "caption": "x"},
        {"image": "half.png", "caption": "\ud800"},
    ]
    text = "\n".join([*map(json.dumps, lines), "{", "[1]"])
    (tmp_path / "a.jsonl").write_text(text)
    packed = run(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert packed["dropped"] == {
        "line lacks the image or the caption": 1,
        "image is not there": 1,
        "image cannot be read": 1,
        "caption is not UTF-8": 1,
        "image is a URL; download it first, for instance with img2dataset": 1,
        "no image path": 1,
        "caption is neither a string nor a list of strings": 1,
        "no caption": 1,
        "line is not a json object": 2,
    }
    assert Counter(json.loads(samples(tmp_path / "out")[0]["json"])["captions"]) == Counter(["one", "uno"])


def test_nothing_to_pack_says_what_was_looked_for_and_found(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(image_bytes(0, suffix="jpg"))
    (source / "b.caption").write_text("x")
    message = complaint(capsys, source, "--out", tmp_path / "out")
    assert "looked for images (jpg, jpeg, png, webp) with captions" in message
    assert "found 1 .jpg, 1 .caption" in message
    assert "no caption: 1, e.g. " in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "--out", "{tmp}/out"], "none' is not there"),
        (["{tmp}/in", "--out", "{tmp}/full"], "holds 1 shards (00000.tar, ...)"),
        (["{tmp}/in", "--out", "{tmp}/a.csv"], "is a file; expected a folder"),
        (["{tmp}/in", "--out", "{tmp}/a,b"], "have a meaning"),
        (["{tmp}/in", "--out", "{tmp}/out", "--per-shard", "0"], "--per-shard 0: expected 1 or more"),
        (["{tmp}/in", "--out", "{tmp}/out", "--image-column", "x"], "SOURCE is a folder"),
        (["{tmp}/full/00000.tar", "--out", "{tmp}/out"], "expected a folder, or a file that ends in .csv, .tsv"),
        (["{tmp}/a.csv", "--out", "{tmp}/out"], "it has 'where', 'caption'. Name the right one with --image-column"),
        (["{tmp}/a.csv", "--out", "{tmp}/out", "--image-column", "were"], "Did you mean 'where'"),
        (["{tmp}/latin.csv", "--out", "{tmp}/out"], "latin.csv cannot be read after line"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    write_folder(tmp_path / "in", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "00000.tar").touch()
    (tmp_path / "a.csv").write_text("where,caption\nx,y\n")
    (tmp_path / "latin.csv").write_bytes("image,caption\nx,é\n".encode("latin-1"))
    assert message in complaint(capsys, *(word.format(tmp=tmp_path) for word in arguments))


def test_an_interrupted_run_leaves_no_shards(tmp_path, monkeypatch, capsys):
    source = write_folder(tmp_path / "in", 12)
    opened, real = [], Image.open

    def interrupt(*arguments, **options):
        opened.append(1)
        if len(opened) == 8:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", interrupt)
    assert main([str(source), "--out", str(tmp_path / "out"), "--per-shard", "3"]) == 130
    assert list((tmp_path / "out").iterdir()) == []
