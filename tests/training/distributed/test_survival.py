"""Runs that are signalled, killed and stopped: nothing is lost, nothing is left behind, and the reason is reported."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.kill_resume import Launched, logged_steps, run_killed, wait_for
from llip.configs import Config
from llip.errors import EXIT_RUN, EXIT_STOPPED
from tests.helpers import write_pairs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked"),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc"),
]


@pytest.fixture(scope="module")
def make_command(tmp_path_factory):
    """Returns the command of a run of a name with other fields: 18 steps, each logged and most of them saved."""
    from tests.helpers import tiny_model_file

    folder = tmp_path_factory.mktemp("survival")
    pairs, model = write_pairs(folder, 32, 16), tiny_model_file(folder)

    def command(logs, name, **changes):
        fields = {
            "name": name, "logs": str(logs), "train_data": pairs, "train_num_samples": 32, "model": model,
            "mixture_tokens": 4, "pool_heads": 4, "batch_size": 8, "epochs": 9, "lr": 1e-3, "warmup": 2,
            "precision": "fp32", "workers": 1, "log_steps": 1, "save_steps": 2, "save_frequency": 0, "report_to": (),
            "device": "cpu", "patch_dropout": 0.25,
        } | changes  # fmt: skip
        config = Config(**fields)
        file = folder / f"{name}.py"
        values = ", ".join(f"{key}={value!r}" for key, value in vars(config).items())
        # The tiny model is faster than a test can aim; and a step can be held.
        slow = "import os, time\nfrom llip.training import trainer\nstep = trainer.backward_step\n"
        slow += "def slowly(*a):\n    time.sleep(0.15)\n"
        slow += f"    while os.path.exists({str(logs / 'hold')!r}):\n        time.sleep(0.05)\n"
        slow += "    return step(*a)\ntrainer.backward_step = slowly\n"
        slow += "from llip.training.checkpoints import checkpoint\nverify = checkpoint.verify\n"  # a small checkpoint
        slow += "def thoroughly(path):\n    time.sleep(0.2)\n    verify(path)\ncheckpoint.verify = thoroughly\n"
        slow += "from torch.distributed.elastic.multiprocessing import api\n"  # the launcher kills what ignores SIGTERM
        slow += "api.PContext.close.__defaults__ = (None, 3)\n"  # after 30 s otherwise
        text = f"from llip.configs import Config\ndef run():\n    return Config({values})\n"
        file.write_text(text + (slow if name != "straight" else ""))
        return [sys.executable, "-m", "llip.main", f"{file}:run"]

    return command


def ranks(launched: Launched) -> list[int]:
    """Return the processes that train, by rank."""

    def parent(process):
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])

    first, second = sorted(each for each in launched.members() if parent(each) == launched.process.pid)
    return [first, second]


class Runs:
    """Starts a run and waits until it is in its steps."""

    def __init__(self, command, folder):
        self.command, self.folder, self.log = command, folder, folder.parent / f"{folder.name}.txt"

    def start(self, steps):
        launched = Launched(self.command, self.log)
        begin = logged_steps(self.folder)
        assert wait_for(lambda: logged_steps(self.folder) >= begin + steps, 100), self.log.read_text()
        return launched

    def end(self, launched, seconds):
        try:
            assert wait_for(lambda: launched.process.poll() is not None, seconds), self.log.read_text()
            assert wait_for(lambda: not launched.members(), 10), "processes are left behind"
            return launched.process.returncode
        finally:
            launched.kill("tree")

    def errors(self):
        return re.findall(r"^error: .*$", self.log.read_text(), re.MULTILINE)


def test_killed_and_resumed_is_undisturbed(make_command, tmp_path):
    """Two processes: the launcher is killed, and then all of them in the middle of a checkpoint."""

    def command(name):
        return make_command(tmp_path, name, ngpus=2)

    outcome = run_killed(command, tmp_path, ["launcher", "writing"], seed=2, processes=2, most=3)
    assert (outcome.kills["launcher"], outcome.kills["writing"]) == (1, 1)
    assert (outcome.steps, outcome.different_losses, outcome.different_weights) == (18, 0, 0)
    assert outcome.survivors == 0


def test_two_processes_agree_when_one_is_signalled(make_command, tmp_path):
    """One of them, and then their launcher, which passes it on."""
    runs = Runs(make_command(tmp_path, "stopped", ngpus=2), tmp_path / "stopped")
    for number, to_launcher in ((signal.SIGUSR2, False), (signal.SIGTERM, True)):
        launched = runs.start(1)
        os.kill(launched.process.pid if to_launcher else ranks(launched)[1], number)
        assert runs.end(launched, 30) == EXIT_STOPPED
        step = logged_steps(runs.folder)
        assert (runs.folder / "checkpoints" / f"step_{step}.pt").is_file(), "what was trained is saved"
    assert runs.errors() == []


def test_one_process_saves_at_ctrl_c_and_leaves_at_the_second(make_command, tmp_path):
    runs = Runs(make_command(tmp_path, "signalled", batch_size=16), tmp_path / "signalled")
    launched = runs.start(2)
    launched.process.send_signal(signal.SIGINT)
    assert runs.end(launched, 20) == EXIT_STOPPED
    step = logged_steps(runs.folder)
    assert (runs.folder / "checkpoints" / f"step_{step}.pt").is_file(), "what was trained is saved"
    assert f"stopped as requested after step {step} of 18" in runs.log.read_text()
    launched = runs.start(1)
    (tmp_path / "hold").touch()
    time.sleep(0.5)
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launched.process.poll() is None, "the step is not done yet"
    launched.process.send_signal(signal.SIGINT)
    assert runs.end(launched, 5) == 128 + signal.SIGINT
    (tmp_path / "hold").unlink()
    assert runs.errors() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stuck_process_ends_the_run_and_is_named(make_command, tmp_path, how):
    runs = Runs(make_command(tmp_path, "lost", ngpus=2, timeout_minutes=0.15, save_steps=0), tmp_path / "lost")
    launched = runs.start(2)
    victim = ranks(launched)[1]
    os.kill(victim, how)
    assert runs.end(launched, 40) == EXIT_RUN
    (error,) = runs.errors()
    assert "process 1" in error
    assert re.search(r"process 1 is gone, last seen at step \d+, \w+", error), error
    if how == signal.SIGKILL:
        assert "process 1 ended: killed by SIGKILL" in error
