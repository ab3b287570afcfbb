"""The sections of `benchmarks.gpu`, tried on a CPU at tiny shapes: a day with a GPU is not for finding mistakes."""

import json
import sys

import pytest
import torch

from benchmarks.gpu.__main__ import SECTIONS, main


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_every_section_is_skipped_with_the_reason(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped, no GPU was found") == len(SECTIONS)


@pytest.mark.slow
def test_sections_of_scores_and_collectives_run(tmp_path):
    assert main(["--device", "cpu", "--tiny", "--sections", "1", "2", "3", "7", "--out", str(tmp_path)]) == 0
    for section in (1, 2, 3, 7):
        result = json.loads((tmp_path / f"{section}.json").read_text())
        assert result["rows"]
        assert not [row for row in result["rows"] if "error" in row]
    errors = json.loads((tmp_path / "1.json").read_text())["rows"]
    assert max(row["scores"] for row in errors if "float32" in row["name"]) < 1e-5


def test_a_failing_section_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "false")
    assert main(["--device", "cpu", "--tiny", "--sections", "2", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "2.json").read_text())["error"].startswith("exit code 1")
