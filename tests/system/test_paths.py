"""Paths as users write them, the same in every field."""

from pathlib import Path

import pytest

from llip.config_search import search_config
from llip.configs import Config
from llip.errors import UserError
from llip.system.paths import is_below


@pytest.mark.parametrize("name", ["", ".", "./", "..", "../x", "a/../../x", "/tmp/x", "~", "~/x", "a\0b"])
def test_a_run_outside_logs_is_refused(name):
    assert not is_below(name)
    if name:
        with pytest.raises(UserError, match="config field name"):
            Config(name=name)


@pytest.mark.parametrize("name", ["x", "a/b", "..x", "x.y", "$x", "a b"])
def test_a_run_below_logs(name):
    assert is_below(name)
    assert Config(name=name, logs="runs").folder == Path("runs") / name


def test_home_and_variables_in_every_path_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK_DIR", "/scratch")
    config = Config(
        name="x", logs="~/runs", pretrained="$WORK_DIR/a.pt", resume="${WORK_DIR}/b.pt", model="~/m.json",
        tokenizer="~/t", evals=("$WORK_DIR/e.yaml",),
    )  # fmt: skip
    assert config.folder == Path("/home/me/runs/x")
    assert (config.pretrained, config.resume) == ("/scratch/a.pt", "/scratch/b.pt")
    assert (config.model, config.tokenizer, config.evals) == ("/home/me/m.json", "/home/me/t", ("/scratch/e.yaml",))


def test_logs_in_an_unset_variable_are_refused(monkeypatch):
    monkeypatch.delenv("NO_SUCH_DIR", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_DIR is not set"):
        Config(logs="$NO_SUCH_DIR/runs")


def test_an_empty_name_means_the_functions_name():
    assert search_config("llip_quickstart", ["name="]).name == "llip_quickstart"
