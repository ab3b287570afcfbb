"""The doctor: its numbers against what was written and against PIL, every kind of damage, and how it ends."""

import io
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import time

import numpy as np
import pytest
import torch
from open_clip import tokenize
from PIL import Image

from llip.config_search import parse_overrides
from llip.data.doctor import pool as doctor_pool
from llip.data.doctor.__main__ import main
from llip.data.doctor.report import KeyDigests
from llip.data.doctor.scan import ScanSettings, ShardFindings, ShardScanner
from llip.data.features.format import write_features
from llip.data.index import load_index
from llip.data.sources import parse_train_data
from tests.helpers import image_bytes, write_pairs, write_tar

HEADERS = ScanSettings(None, full_images=False, context_length=77)


def diagnose(capsys, *arguments):
    """Run the doctor with --json; return (exit code, document)."""
    code = main([*map(str, arguments), "--json", "--workers", "2"])
    return code, json.loads(capsys.readouterr().out)


def picture(mode, size, kind):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def pair(i, **members):
    return {"jpg": image_bytes(i, suffix="jpg"), "txt": b"x", **members}


def test_a_sound_dataset(tmp_path, capsys):
    lists = [["a dog", "a dog that runs " * 40], ["one"], ["a", "b", "c"]]
    sizes = [(40, 30), (64, 64), (25, 90)]
    kinds = [("RGB", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG")]
    for shard in range(2):
        write_tar(
            tmp_path / f"{shard}.tar",
            [
                {
                    ("png" if kind == "PNG" else "jpg"): picture(mode, size, kind),
                    "txt": b"plain words",
                    "json": json.dumps({"captions": captions, "url": "u", "n": 1 if shard else None}).encode(),
                }
                for captions, size, (mode, kind) in zip(lists, sizes, kinds, strict=True)
            ],
        )
    code, report = diagnose(capsys, tmp_path / "*.tar")
    assert (code, report["damage"], report["damaged_shards"], report["notes"][:1]) == (
        0,
        {},
        {},
        ["json.captions: 17% of the captions are truncated at the context length"],
    )
    assert (report["shards"], report["samples"], report["usable"]) == (2, 6, 6)
    assert report["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert report["members"] == {"jpg": 4, "txt": 6, "json": 6, "png": 2}
    assert report["json_fields"]["n"] == {"null": 3, "number": 3}
    assert report["json_fields"]["captions"] == {"list of strings": 6}
    assert report["image_formats"] == {"JPEG": 4, "PNG": 2}
    assert report["image_modes"] == {"RGB": 2, "L": 2, "RGBA": 2}
    assert report["image_width"] == {"min": 25, "median": 40, "max": 64}
    assert report["image_height"] == {"min": 30, "median": 64, "max": 90}
    findings = report["captions"]["json.captions"]
    lengths = sorted((tokenize([text], 1000) != 0).sum().item() for captions in lists for text in captions)
    assert findings["tokens"] == {"min": lengths[0], "median": statistics.median_low(lengths), "max": lengths[-1]}
    assert findings["truncated"] == pytest.approx(sum(length > 77 for length in lengths) / len(lengths))
    assert findings["per_image"] == {"min": 1, "median": 2, "max": 3}
    assert report["config"]["caption_keys"] == "json.captions:0.5,txt:0.5"
    assert report["config"]["train_num_samples"] == "6"


def test_damage_by_shard_and_reason(tmp_path, capsys):
    write_tar(
        tmp_path / "mixed.tar",
        [
            pair(0),
            pair(1, jpg=b"<html>"),
            pair(2, jpg=image_bytes(2, 300, "jpg")[:900]),
            pair(3, jpg=b""),
            pair(4, txt=b" "),
            pair(5, txt=b"\xff\xfe"),
            {"txt": b"x"},
            pair(7, json=b"{"),
        ],
    )
    cut = write_tar(tmp_path / "cut.tar", [{"jpg": image_bytes(i, suffix="jpg"), "txt": b"x"} for i in range(40)])
    cut.write_bytes(cut.read_bytes()[:30_000])
    (tmp_path / "empty.tar").touch()
    (tmp_path / "html.tar").write_bytes(b"<html>" * 500)
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    names = ["mixed", "cut", "empty", "html", "none", "missing"]
    pattern = ",".join(f"{tmp_path}/{name}.tar" for name in names)
    code, report = diagnose(capsys, pattern)
    assert code == 1
    reasons = {url.split("/")[-1]: damage["reasons"] for url, damage in report["damaged_shards"].items()}
    assert reasons["mixed.tar"] == {
        "not an image": 1,
        "truncated image": 1,
        "empty image": 1,
        "no caption": 1,
        "txt is not UTF-8": 1,
        "no image": 1,
    }
    assert {name: reasons[name] for name in reasons if name != "mixed.tar"} == {
        "cut.tar": {"truncated tar": 1},
        "empty.tar": {"shard has zero bytes": 1},
        "html.tar": {"shard is not a tar": 1},
        "none.tar": {"shard holds no samples": 1},
        "missing.tar": {"shard is not there": 1},
    }
    with_header = (512 + 1024 + 512 + 512) if len(image_bytes(0, suffix="jpg")) > 512 else 0
    assert with_header, "the pictures of this test take two blocks"
    assert report["usable"] == 2 + (30_000 - 512) // with_header  # of mixed.tar, and those before the cut
    assert any("refuses to start while shards are missing or empty" in note for note in report["notes"])


def test_header_checks_do_not_decode(tmp_path, capsys):
    torn, bomb = image_bytes(2, 300, "jpg")[:900], picture("1", (10_000, 9_000), "PNG")
    write_tar(tmp_path / "a.tar", [pair(0), pair(1, jpg=torn), pair(2, jpg=b"no"), pair(3, jpg=bomb)])
    _, full = diagnose(capsys, tmp_path / "a.tar")
    _, header = diagnose(capsys, tmp_path / "a.tar", "--image-checks", "header")
    assert full["damage"] == {"truncated image": 1, "not an image": 1, "image of too many pixels": 1}
    assert header["damage"] == {"not an image": 1, "image of too many pixels": 1}


@pytest.mark.parametrize(
    ("record", "txt", "suggested"),
    [
        ({"caption": "x", "url": "u", "key": "1"}, b"x", "txt"),  # as img2dataset writes it
        ({"caption": "x", "url": "u"}, None, "json.caption"),
        ({"alt": "x", "captions": ["x"]}, None, "json.captions"),
        ({"captions": ["x"]}, b"x", "json.captions:0.5,txt:0.5"),
        ({"url": "u"}, None, None),
        ({"captions": ["x"], "label": 3}, b"", "json.captions"),
    ],
)
def test_suggested_caption_keys(tmp_path, capsys, record, txt, suggested):
    members = {"json": json.dumps(record).encode()} | ({} if txt is None else {"txt": txt})
    write_tar(tmp_path / "a.tar", [{"jpg": image_bytes(0, suffix="jpg"), **members}] * 3)
    code, report = diagnose(capsys, tmp_path / "a.tar")
    assert report["config"].get("caption_keys") == suggested
    assert report["usable"] == (3 if suggested else 0)
    assert code == (0 if suggested else 1)


def test_given_caption_keys_decide_what_is_usable(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [pair(0), pair(1, json=b'{"label": "y"}'), pair(2, json=b'{"label": 3}')])
    _, report = diagnose(capsys, tmp_path / "a.tar", "--caption-keys", "json.label")
    assert report["damage"] == {"no caption": 1, "json.label is neither a string nor a list of strings": 1}
    assert (report["usable"], report["config"]["caption_keys"]) == (1, "json.label")


def test_the_lines_for_the_config_are_overrides(tmp_path, capsys):
    pattern = write_pairs(tmp_path / "my data", 8, 4)
    assert main([pattern, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "8: 8 usable, 0 not" in out
    words = shlex.split(out[out.index("on this machine):\n") + len("on this machine):\n") :].replace("\\\n", " "))
    values = parse_overrides(words)
    assert (values["train_data"], values["train_num_samples"], values["caption_keys"]) == (pattern, 8, "txt")
    assert 1 <= values["workers"] <= 2


def test_duplicate_keys(tmp_path, capsys):
    keys = [["a", "b", "a", "c"], ["d", "c", "b"], ["e"]]
    for i, names in enumerate(keys):
        write_tar(tmp_path / f"{i}.tar", [pair(j) for j in range(len(names))], names)
    code, report = diagnose(capsys, tmp_path / "*.tar")
    findings = report["duplicate_keys"]
    assert (findings["within_shards"], findings["across_shards"], findings["checked"]) == (1, 2, 1.0)
    assert findings["shards"] == {str(tmp_path / "0.tar"): 2, str(tmp_path / "1.tar"): 2}
    assert code == 0  # merely odd
    assert [note for note in report["notes"] if "are repeated" in note]


def test_duplicates_in_bounded_memory():
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 2**63, 1000).astype(np.uint64) for _ in range(64)]
    shards[40][:500] = shards[3][:500]
    digests = KeyDigests(limit=10_000)
    for i, keys in enumerate(shards):
        digests.add(str(i), np.sort(keys))
        assert digests.held <= 10_000
    findings = digests.report()
    assert findings.checked == 1 / 8
    assert findings.across_shards == pytest.approx(500 / 8, rel=0.4)
    assert findings.shards.keys() == {"3", "40"}


def test_the_index_is_written(tmp_path, capsys):
    pattern = write_pairs(tmp_path, 10, 4)
    (tmp_path / "00001.tar").write_bytes(b"no tar")
    assert main([pattern, "--index", "--workers", "2"]) == 1
    urls = list(parse_train_data(pattern).urls)
    assert load_index(urls) == dict(zip(urls, (4, 0, 2), strict=True))
    pipes = f"pipe:cat {pattern}"
    assert main([pipes, "--index-dir", str(tmp_path / "index"), "--workers", "2"]) == 1
    assert list(load_index(parse_train_data(pipes).urls, tmp_path / "index").values()) == [4, 0, 2]
    assert str(tmp_path / "index" / "llip-index.json") in capsys.readouterr().err


def test_a_failing_command_is_damage_and_not_indexed(tmp_path, capsys):
    pattern = write_pairs(tmp_path, 4)
    broken = f"pipe:cat {pattern.replace('{00000..00000}', '00000')}; exit 3"
    code, report = diagnose(capsys, broken, "--index-dir", tmp_path / "index")
    assert (code, report["damage"], report["usable"]) == (1, {"shard command failed": 1}, 4)
    assert report["damaged_shards"][broken]["details"] == {"shard command failed": "exit code 3"}
    assert load_index([broken], tmp_path / "index") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none/*.tar"], "matches no file"),
        (["{tmp}/none/{{0..3}}.tar"], "4 of 4 shards are missing"),
        (["{tmp}/a.tar", "{tmp}/b.tar"], "2 patterns given; quote the pattern"),
        (["{tmp}/a.tar", "--caption-keys", "json"], "caption_keys: cannot read 'json'"),
        (["{tmp}/a.tar", "--workers", "-1"], "--workers -1: expected 0 to 512"),
        (["{tmp}/a.tar", "--workers", "100000"], "--workers 100000: expected 0 to 512"),
        (["{tmp}"], "is a folder"),
        (["{tmp}/a.tar", "--context-length", "2"], "--context-length 2: expected 3 or more"),
        (["pipe:cat {tmp}/a.tar", "--index"], "need a folder for the index, --index-dir DIR"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    write_tar(tmp_path / "a.tar", [pair(0)])
    assert main([word.format(tmp=tmp_path) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")


def die_on(name):
    def scan(self, url, progress):
        if url.endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, url, progress)

    real = ShardScanner.scan
    return scan


def test_a_process_that_dies_takes_only_its_shard_along(tmp_path, monkeypatch):
    pattern = write_pairs(tmp_path, 40, 4)
    monkeypatch.setattr(ShardScanner, "scan", die_on("00003.tar"))
    urls = list(parse_train_data(pattern).urls)
    findings = {url: answer for url, answer in doctor_pool.scan_shards(urls, HEADERS, 3) if not isinstance(answer, int)}
    assert findings.keys() == set(urls)
    assert {url: answer.samples for url, answer in findings.items()} == {url: 4 * (url != urls[3]) for url in urls}
    assert findings[urls[3]].damage == {doctor_pool.WORKER_DIED: 1}


@pytest.mark.slow
def test_a_process_that_hangs_is_replaced(tmp_path, monkeypatch):
    urls = list(parse_train_data(write_pairs(tmp_path, 12, 4)).urls)

    def scan(self, url, progress):
        if url == urls[0]:
            time.sleep(100)
        return ShardFindings(url, samples=4)

    monkeypatch.setattr(ShardScanner, "scan", scan)
    monkeypatch.setattr(doctor_pool, "_PATIENCE", 0.0)
    settings = ScanSettings(None, False, 77, deadline=1.5)
    started = time.monotonic()
    findings = dict(doctor_pool.scan_shards(urls, settings, 1))
    assert time.monotonic() - started < 10
    assert [findings[url].samples for url in urls] == [0, 4, 4]
    assert findings[urls[0]].damage == {doctor_pool.WORKER_SILENT: 1}


@pytest.mark.slow
def test_a_stalled_shard_does_not_hold_up_the_rest(tmp_path):
    write_pairs(tmp_path, 4)
    fifo = tmp_path / "hung.tar"
    os.mkfifo(fifo)
    urls = [str(fifo), "pipe:sleep 30", str(tmp_path / "00000.tar")]
    settings = ScanSettings(None, False, 77, deadline=1.0)
    findings = dict(doctor_pool.scan_shards(urls, settings, 1))
    assert [findings[url].damage for url in urls] == [{"shard stalled": 1}, {"shard stalled": 1}, {}]
    assert findings[urls[2]].samples == 4


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardScanner, "scan", lambda self, url, progress: 1 // 0)
    with pytest.raises(RuntimeError, match=r"(?s)a\.tar.*ZeroDivisionError"):
        list(doctor_pool.scan_shards(["a.tar"], HEADERS, 1))


def _run_doctor(pattern, output):
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main([pattern, "--workers", "2"]))


@pytest.mark.slow
def test_ctrl_c_ends_at_once_without_a_traceback(tmp_path):
    output, mark, late = (tmp_path / name for name in ("output", "mark", "late"))
    pattern = f"pipe:touch {mark}; sleep 4; touch {late}"
    process = multiprocessing.get_context("fork").Process(target=_run_doctor, args=(pattern, output))
    process.start()
    for _ in range(200):
        if mark.exists():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    started = time.monotonic()
    process.join(20)
    assert time.monotonic() - started < 3
    assert process.exitcode == 130
    text = output.read_text()
    assert "Traceback" not in text
    assert text.endswith("interrupted\n")
    time.sleep(4.5 - (time.monotonic() - started))
    assert not late.exists(), "the command outlived the doctor"


def test_features_of_a_cache_are_named_by_type_and_shape(tmp_path, capsys):
    features, captions = write_features("image", torch.zeros(4, 6), "fp16"), {"txt": b"a caption"}
    write_tar(tmp_path / "a.tar", [features | captions, {"image.error": b"truncated image"} | captions])
    write_tar(tmp_path / "b.tar", [{"image.npy": b"junk"} | captions])
    code, report = diagnose(capsys, tmp_path / "*.tar")
    assert code == 1
    assert report["image_formats"] == {"features float16 4 x 6": 1}
    assert report["damage"] == {"truncated image": 1, "damaged features": 1}
