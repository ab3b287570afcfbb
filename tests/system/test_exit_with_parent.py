"""Workers and their commands end with the process that started them, and not with a signal to everybody."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import write_pairs

PROGRAM = """
import itertools, sys, time
from llip.configs import Config
from llip.open_clip.factory import get_tokenizer
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data
config = Config(train_data=sys.argv[1], workers=1, batch_size=4)
data, tokenizer = parse_train_data(config.train_data), get_tokenizer(context_length=12)
batches = iter(make_loader(CaptionedImages(config, data, tokenizer, 32, DataPosition(1)), pin=False))
worker = batches._workers[0]
print(worker.pid, flush=True)
if sys.stdin.readline():
    worker.terminate()
time.sleep(60)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_worker_takes_its_command_along(tmp_path, victim):
    pattern = write_pairs(tmp_path, 8, 8)
    note = tmp_path / "pid"
    command = f"pipe:cat {pattern.replace('{00000..00000}', '00000')}; sleep 300 & echo $! > {note}; wait"
    program = [sys.executable, "-c", PROGRAM, command]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            worker = int(parent.stdout.readline())
            wait_for(lambda: note.exists() and note.read_text().strip())
            sleeper = int(note.read_text())
            assert alive(worker)
            assert alive(sleeper)
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # a scheduler signals every process
                os.kill(worker, each)
            time.sleep(0.5)
            assert alive(worker)
            assert alive(sleeper)
            if victim == "worker":
                parent.stdin.write("end it\n")
                parent.stdin.flush()
            else:
                parent.kill()
            wait_for(lambda: not alive(sleeper))
            wait_for(lambda: not alive(worker))
        finally:
            parent.kill()
