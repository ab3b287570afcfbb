"""Images of other modes than 8-bit RGB, against numbers worked out by hand; files that are none; signals to workers."""

import io
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llip.clipeval import loading
from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.loading import image_batches
from llip.open_clip.pixels import to_rgb
from llip.system.exit_with_parent import STOP_SIGNALS
from tests.clipeval.fakes import preprocess, write_catalog, write_imagefolder


def reread(image: Image.Image, kind: str) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return Image.open(buffer)


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    deep = np.array([[0, 257, 256], [128 * 257, 65535, 65534]], dtype=np.uint16)
    image = reread(Image.fromarray(deep), "png")
    assert image.mode == "I;16"
    found = np.asarray(to_rgb(image))
    assert found.shape == (2, 3, 3)
    assert found[..., 0].tolist() == [[0, 1, 0], [128, 255, 254]]
    assert np.asarray(to_rgb(Image.fromarray(deep.astype(np.int32)))).tolist() == found.tolist()


def test_pixels_of_unknown_range_are_refused() -> None:
    for values in (np.array([[70000]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            to_rgb(Image.fromarray(values))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (2, 2), 77), "png", (77, 77, 77)),
        (Image.new("1", (2, 2), 1), "png", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "png", (10, 20, 30)),  # as OpenCLIP: alpha is dropped
        (Image.new("LA", (2, 2), (9, 128)), "png", (9, 9, 9)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), "gif", (1, 2, 3)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", (255, 0, 0)),
    ],
)
def test_other_modes(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    found = to_rgb(reread(image, kind))
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", expected)


def test_files_that_are_no_images_are_named_with_the_reason(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "set", ["ant"], 5)
    bad = {"000.png": b"", "001.png": b"GIF89a", "003.png": (tmp_path / "set/ant/003.png").read_bytes()[:60]}
    for name, data in bad.items():
        (tmp_path / "set/ant" / name).write_bytes(data)
    (tmp_path / "set/ant/002.png").unlink()
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "set/ant/002.tiff")
    entry = {"type": "imagefolder", "path": "set", "prompts": ["a {c}"]}
    source = load_catalog(write_catalog(tmp_path / "catalog.json", {"t": entry}))["t"].data.open()
    (batch,) = image_batches(source, preprocess, range(5), 8, workers=0)
    assert batch.indices == [4]
    assert [Path(item.name).name for item in batch.unreadable] == ["000.png", "001.png", "002.tiff", "003.png"]
    assert all(item.reason for item in batch.unreadable)
    assert "floating-point" in batch.unreadable[2].reason


def slowly(image: Image.Image) -> torch.Tensor:
    time.sleep(0.03)
    return preprocess(image)


@pytest.fixture
def pictures(tmp_path: Path):
    """An image source of 24 pictures, in a process that notes signals and continues, as a run that evaluates."""
    write_imagefolder(tmp_path / "set", ["ant", "bee"], 12)
    entry = {"type": "imagefolder", "path": "set", "prompts": ["a {c}"]}
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    yield load_catalog(write_catalog(tmp_path / "catalog.json", {"t": entry}))["t"].data.open()
    for number, handler in before.items():
        signal.signal(number, handler)


EXPECTED = [[first, first + 1] for first in range(0, 24, 2)]


def test_signals_to_every_process_of_a_run_do_not_end_its_workers(pictures) -> None:
    batches = image_batches(pictures, slowly, range(24), 2, workers=2)
    found = [next(batches).indices]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in STOP_SIGNALS:  # from a process of its own: the parent's are for the worker
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True, timeout=10)
    found += [batch.indices for batch in batches]
    assert found == EXPECTED
    assert [worker.is_alive() for worker in workers] == [False, False]


def test_nor_do_signals_in_the_moment_of_their_start(pictures, monkeypatch, tmp_path: Path) -> None:
    begin = loading._begin_worker

    def signalled(number: int) -> None:
        for each in STOP_SIGNALS:
            os.kill(os.getpid(), each)
        (tmp_path / f"signalled_{number}").touch()
        begin(number)

    monkeypatch.setattr(loading, "_begin_worker", signalled)
    assert [batch.indices for batch in image_batches(pictures, slowly, range(24), 2, workers=2)] == EXPECTED
    assert len(list(tmp_path.glob("signalled_*"))) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS), "this process listens again"


def test_an_iteration_that_is_left_takes_its_workers_along(pictures) -> None:
    batches = image_batches(pictures, slowly, range(24), 2, workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    workers[0].terminate()  # as torch does with one that does not leave: the parent is listened to
    workers[0].join(10)
    assert not workers[0].is_alive()
    batches.close()
    workers[1].join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]
