"""The bytes of a shard: over HTTP from servers that fail in every way, and from commands."""

import contextlib
import http.server
import io
import os
import socket
import struct
import tarfile
import threading
import time

import pytest
import torch

from llip.data import shard_file
from llip.data.prefetch import ReadWatch, read_ahead
from llip.data.shard_file import ShardFile
from llip.data.tar_reader import Damage, read_samples
from tests.data.helpers import config, dropped, ids, take
from tests.helpers import write_pairs

COUNT, SIZE = 60, 20_000


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(shard_file, "_BACKOFF", 0.01)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            info = tarfile.TarInfo(f"{number:04d}.jpg")
            info.size = SIZE
            tar.addfile(info, io.BytesIO(os.urandom(SIZE)))
    return path


class Server:
    """Serves `content`, or the files of `folder`.

    `plan` has the trouble of each request in turn: none, a status, a URL to redirect to, or what breaks off the body.
    """

    def __init__(self, content, plan=(), ranges=True, etag=None):
        self.content, self.plan, self.ranges, self.etag = content, list(plan), ranges, etag
        self.folder = None
        self.requests = []  # (path, headers)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, dict(self.headers)))
                trouble = server.plan.pop(0) if server.plan else None
                with contextlib.suppress(OSError):
                    server.answer(self, trouble)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.host}/a.tar"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, trouble):
        if isinstance(trouble, int):
            handler.send_error(trouble)
            return
        if isinstance(trouble, str):
            handler.send_response(302)
            handler.send_header("Location", trouble)
            handler.end_headers()
            return
        body, start = self.content or (self.folder / handler.path[1:]).read_bytes(), 0
        if self.ranges and "Range" in handler.headers:
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) - start))
        if self.etag:
            handler.send_header("ETag", self.etag())
        handler.end_headers()
        if trouble is not None:
            end = start + (len(body) - start) // 2
            handler.wfile.write(body[start:end])
            trouble(handler)
        else:
            handler.wfile.write(body[start:])


def cut(handler):
    handler.close_connection = True


def reset(handler):
    handler.wfile.flush()
    time.sleep(0.05)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def silence(handler):
    handler.wfile.flush()
    time.sleep(2)


@contextlib.contextmanager
def serve(*arguments, **keywords):
    server = Server(*arguments, **keywords)
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def without_url(items):
    return [item if isinstance(item, Damage) else {**item, "__url__": ""} for item in items]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "plan",
    [[], [500], [503, 429, 502], [cut], [reset], [cut, 500, cut, reset, 504], [500] * 5],
    ids=lambda plan: "-".join(getattr(step, "__name__", str(step)) for step in plan),
)
def test_what_a_server_recovers_from_costs_no_sample_and_repeats_none(shard, ranges, plan):
    with serve(shard.read_bytes(), plan, ranges) as server:
        samples = list(read_samples(server.url))
        assert without_url(samples) == without_url(read_samples(str(shard)))
        assert len(server.requests) == len(plan) + 1


def test_a_silent_connection_is_replaced(shard, monkeypatch):
    monkeypatch.setattr(shard_file, "_SILENCE", 0.3)
    with serve(shard.read_bytes(), [silence]) as server:
        assert without_url(read_samples(server.url)) == without_url(read_samples(str(shard)))


@pytest.mark.parametrize("skip", [0, 20])
def test_a_server_that_stays_broken_loses_the_rest_of_the_shard(shard, skip):
    with serve(shard.read_bytes(), [cut] + [500] * 100) as server:
        *samples, damage = read_samples(server.url, skip)
        assert len(server.requests) == 6
    kept = shard.stat().st_size // 2 // (512 + -(-SIZE // 512) * 512)  # members that came, the last of them cut
    assert kept - 1 <= skip + len(samples) <= kept
    assert without_url(samples) == without_url(read_samples(str(shard)))[skip : skip + len(samples)]
    assert damage.reason == shard_file.DOWNLOAD_FAILED
    assert damage.detail.startswith("HTTP status 500 Internal Server Error (6 attempts in ")


@pytest.mark.parametrize(
    ("status", "reason"), [(404, shard_file.MISSING), (410, shard_file.MISSING), (403, shard_file.UNREADABLE)]
)
def test_a_refusal_is_final(shard, status, reason):
    with serve(shard.read_bytes(), [status]) as server:
        (damage,) = read_samples(server.url)
        assert len(server.requests) == 1
    assert damage.reason == reason
    assert damage.detail.startswith(f"HTTP status {status} ")


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar"
        (damage,) = read_samples(url)
    assert damage.reason == shard_file.DOWNLOAD_FAILED
    assert "Connection refused (6 attempts" in damage.detail


def test_attempts_end_in_time(shard, monkeypatch):
    monkeypatch.setattr(shard_file, "_BACKOFF", 0.2)
    monkeypatch.setattr(shard_file, "_PATIENCE", 0.5)
    with serve(shard.read_bytes(), [500] * 100) as server:
        (damage,) = read_samples(server.url)
        assert 1 < len(server.requests) < 6
    assert damage.reason == shard_file.DOWNLOAD_FAILED


def test_a_shard_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(shard):
    versions = iter("abc")
    with serve(shard.read_bytes(), [cut], etag=lambda: next(versions)) as server:
        *samples, damage = read_samples(server.url)
    assert 0 < len(samples) < COUNT
    assert damage == Damage(server.url, shard_file.UNREADABLE, "changed while it was read")


def test_a_silent_server_is_a_stalled_shard_and_the_next_one_is_read(shard, monkeypatch):
    monkeypatch.setattr(shard_file, "_SILENCE", 0.5)
    watch = ReadWatch()
    with serve(shard.read_bytes(), [silence] * 100) as server:
        urls = (server.url, str(shard))
        items = list(read_ahead((item for url in urls for item in read_samples(url, watch=watch)), watch, 0.4))
    assert [item.reason for item in items if isinstance(item, Damage)] == [shard_file.STALLED]
    assert without_url(items[-COUNT:]) == without_url(read_samples(str(shard)))


def test_credentials_go_to_their_host_only(shard):
    with serve(shard.read_bytes(), [cut]) as other, serve(b"", [other.url] * 2) as first:
        samples = list(read_samples(f"http://me:p%40ss@{first.host}/a b.tar"))
        assert len(samples) == COUNT
    assert first.requests[0][0] == "/a%20b.tar"
    assert first.requests[0][1]["Authorization"] == "Basic bWU6cEBzcw=="
    assert not any("Authorization" in headers for _, headers in other.requests)
    assert ["Range" in headers for _, headers in other.requests] == [False, True]


def test_huggingface_files_are_downloaded_with_the_token(shard, monkeypatch):
    class Files:
        def resolve_path(self, url):
            assert url == "hf://datasets/me/set/a.tar"
            return type(
                "Path", (), {"repo_id": "me/set", "repo_type": "dataset", "revision": "main", "path_in_repo": "a.tar"}
            )

    with serve(shard.read_bytes(), [cut]) as server:
        monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo, file, **_: f"http://{server.host}/{repo}/{file}")
        assert len(list(read_samples("hf://datasets/me/set/a.tar"))) == COUNT
    assert [path for path, _ in server.requests] == ["/me/set/a.tar"] * 2
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.requests)


def test_file_urls_are_files(shard):
    assert without_url(read_samples(shard.as_uri())) == without_url(read_samples(str(shard)))
    assert ShardFile(shard.as_uri(), ReadWatch()).size == shard.stat().st_size


def test_zstd_is_named_with_the_way_to_read_it(tmp_path):
    path = tmp_path / "a.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + os.urandom(600))
    assert list(read_samples(str(path))) == [Damage(str(path), shard_file.ZSTD, f"use 'pipe:zstd -dc {path}'")]


def test_the_last_line_of_a_command_is_its_reason_and_goes_nowhere_else(capfd):
    (damage,) = read_samples(r"pipe:printf 'a line\n50 %%\r100 %%\nfatal error: no such bucket\n\n' >&2; exit 3")
    assert damage.detail == "exit code 3: fatal error: no such bucket"
    assert capfd.readouterr() == ("", "")


def test_a_command_that_reads_its_input_ends():
    saved, (here, there) = os.dup(0), os.pipe()  # an input that never ends
    os.dup2(here, 0)
    try:
        assert [damage.reason for damage in read_samples("pipe:timeout 5 cat")] == [shard_file.ZERO_BYTES]
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, here, there):
            os.close(descriptor)


def test_object_stores_are_read_by_their_commands(shard, tmp_path, monkeypatch):
    program = tmp_path / "gsutil"
    program.write_text(f'#!/bin/sh\ntest "$*" = "cat gs://bucket/it is a.tar" && cat {shard}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert without_url(read_samples("gs://bucket/it is a.tar")) == without_url(read_samples(str(shard)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_those_of_files(tmp_path, workers):
    pattern = write_pairs(tmp_path, 48, 8)
    expected = take(20, config(pattern, workers=workers, shuffle_buffer=9))
    plan = [500, cut, None, reset, None, cut, 503] * 20
    with serve(None, plan) as server:
        server.folder = tmp_path
        batches = take(20, config(f"http://{server.host}/{{00000..00005}}.tar", workers=workers, shuffle_buffer=9))
    assert [batch.error for batch in batches] == [""] * 20
    assert ids(batches) == ids(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.tokens, other.tokens)
    assert len(server.requests) > 40
    assert not dropped(batches)
