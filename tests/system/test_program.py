"""Every program fails alike."""

import sys

import pytest

import llip.main
from llip.errors import EXIT_RUN, RunError, UserError
from llip.system.program import INTERRUPTED, program


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no such thing"), 2), (RunError("no such thing"), EXIT_RUN), (None, 0)]
)
def test_errors_are_one_message(capsys, error, code):
    @program
    def main(arguments):
        if error:
            raise error

    assert main(["x"]) == code
    assert capsys.readouterr().err == ("error: no such thing\n" if error else "")


def test_ctrl_c(capsys):
    @program
    def main(arguments):
        raise KeyboardInterrupt

    assert main([]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_while_a_run_starts(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llip.main.launch", interrupt)
    assert llip.main.main(["llip_quickstart"]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    @program
    def main(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "3"])

    @program
    def main(arguments):
        return int(arguments[0])

    assert main() == 3
