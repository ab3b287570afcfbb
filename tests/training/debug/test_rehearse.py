"""The rehearsal: what it measures, what it asks for, and that it leaves nothing behind."""

import json

import pytest

from llip.configs import Config
from llip.training.debug.rehearse import main, margin
from tests.helpers import tiny_model_file, write_pairs

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def config_file(tmp_path):
    config = Config(
        train_data=write_pairs(tmp_path / "pairs", 32, 16), train_num_samples=32, model=tiny_model_file(tmp_path),
        mixture_tokens=4, pool_heads=4, batch_size=16, epochs=400, precision="fp32", workers=0, warmup=2,
        logs=str(tmp_path / "logs"), device="cpu",
    )  # fmt: skip
    fields = ", ".join(f"{key}={value!r}" for key, value in vars(config).items() if key != "name")
    file = tmp_path / "config.py"
    file.write_text(f"from llip.configs import Config\ndef run():\n    return Config({fields})\n")
    return f"{file}:run"


def test_the_margin_covers_a_signal_at_the_worst_moment():
    assert margin(longest_step=10, write=50, stop=3) == 150
    assert margin(longest_step=1, write=2, stop=20.2) == 71


@pytest.mark.slow
def test_a_rehearsal_measures_and_tidies_up(config_file, tmp_path, capsys):
    assert main([config_file, "--steps", "3", "--deadline", "200", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["step"] <= result["longest_step"] < result["start"]
    assert 0 < result["stop"] < 60
    assert result["signal_margin"] == margin(result["longest_step"], result["write"], result["stop"])
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "--steps 1: expected at least 2"),
        (["--steps", "500"], "has 800 steps; give --steps below half"),
        (["nodes=2"], "rehearse on one of them with nodes=1"),
        (["leraning_rate=2"], "unknown config field"),
    ],
)
def test_mistakes_are_one_message(config_file, words, message, capsys):
    assert main([config_file, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_shown(config_file, capsys):
    assert main([config_file, "train_data=nowhere.tar", "--steps", "2"]) == 3
    error = capsys.readouterr().err
    assert "ended with exit code 2" in error
    assert "nowhere.tar" in error
