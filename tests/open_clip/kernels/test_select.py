"""Who computes the scores, and why."""

import logging
import subprocess
import sys

import pytest
import torch

from llip.config_search import search_config
from llip.errors import UserError
from llip.main import main
from llip.open_clip.costs.flops import score_plan_of
from llip.open_clip.kernels import select
from llip.open_clip.kernels.blocks import HeadShape, choose_blocks
from llip.open_clip.scores.plan import Kernel
from tests.helpers import config_file, tiny_run

SHAPE = HeadShape(2, 4, 16, 16, 4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Keep what one test asks for out of the next."""
    monkeypatch.setattr(select, "_request", "auto")
    select._compare.cache_clear()


def test_a_cpu_has_eager_without_a_word():
    assert select.choose_kernel(CPU, torch.float32, SHAPE) is None


def test_triton_on_a_cpu_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name = config_file(tmp_path / "configs.py", tiny_run(tmp_path, score_kernel="triton"))
    assert main([name]) == 2
    message = capsys.readouterr().err
    reason = "the scores are on the CPU" if select.importlib.util.find_spec("triton") else "triton is not installed"
    assert "config field score_kernel = 'triton'" in message
    assert reason in message
    assert "score_kernel=auto" in message


@pytest.mark.slow
def test_no_triton_is_needed_on_a_cpu():
    code = """
import sys
sys.modules["triton"] = None  # importing it is an error
import torch
from llip.open_clip.pooling import create_pooling
scores = create_pooling("text", 4, 16, 2, 5.0).scores(torch.randn(2, 4, 16), torch.eye(16))
scores.sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (HeadShape(1, 129, 16, 16, 2), "129 tokens to attend to, more than 128"),
        (HeadShape(16, 33, 16, 16, 2), "33 tokens x 16 heads, more than 512"),
        (HeadShape(1, 4, 264, 16, 2), "heads of 264 numbers, more than 256"),
        (HeadShape(1, 4, 16, 16, 8), "float64"),
    ],
)
def test_shapes_that_the_kernels_do_not_take(monkeypatch, shape, reason):
    monkeypatch.setattr(select, "_unavailable", lambda device: None)
    assert select.planned_kernel("auto", shape) == Kernel("eager", reason)
    assert select.choose_kernel(CUDA, torch.bfloat16, shape) == Kernel("eager", reason)


def test_what_a_run_on_gpus_is_planned_with():
    config = search_config("llip_b16_k32")
    assert "score_kernel triton" in str(score_plan_of(config))
    assert "score_kernel eager (as set)" in str(score_plan_of(config.replace(score_kernel="eager")))
    assert "score_kernel" not in str(score_plan_of(config, on_cpu=True))
    patches = score_plan_of(config.replace(pair_tokens="patches"))
    assert "score_kernel eager (196 tokens to attend to, more than 128)" in str(patches)
    assert patches.form == "shared_gram"


def test_blocks_are_powers_of_two():
    for tokens in (1, 5, 31, 64, 128):
        for size, itemsize in ((24, 2), (72, 2), (160, 2), (64, 4)):
            blocks = choose_blocks(HeadShape(4, tokens, size, size + 8, itemsize), hopper=True)
            assert all(n & (n - 1) == 0 and n >= 16 for n in blocks[:5])


class TestComparison:
    """Of the kernels with eager, in Triton's interpreter."""

    @pytest.fixture(autouse=True)
    def interpreter(self):
        pytest.importorskip("triton", reason="triton comes with PyPI's CUDA build of torch")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU")

    def test_kernels_that_agree_are_taken(self, monkeypatch):
        monkeypatch.setattr(select, "_request", "triton")
        state = torch.get_rng_state()
        with torch.inference_mode():
            kernel = select.choose_kernel(CPU, torch.bfloat16, SHAPE._replace(itemsize=2))
        assert kernel.name == "triton"
        assert "relative difference to eager: scores" in kernel.reason
        assert torch.equal(state, torch.get_rng_state())

    def test_kernels_that_differ_are_not(self, monkeypatch, caplog):
        from llip.open_clip.kernels import launch

        right = launch.kernel_scores
        monkeypatch.setattr(launch, "kernel_scores", lambda *args, **options: 1.001 * right(*args, **options))
        monkeypatch.setattr(select, "_unavailable", lambda device: None)
        compare = select._compare
        monkeypatch.setattr(select, "_compare", lambda device, *rest: compare(CPU, *rest))
        with caplog.at_level(logging.WARNING, "llip"):
            kernels = [select.choose_kernel(CUDA, torch.float32, SHAPE) for _ in range(2)]
        assert kernels[0] == kernels[1]
        assert kernels[0].name == "eager"
        assert "scores 1.0e-03" in kernels[0].reason
        assert len(caplog.records) == 1  # once
        assert "scores 1.0e-03" in caplog.text

        monkeypatch.setattr(select, "_request", "triton")
        with pytest.raises(UserError, match=r"scores 1\.0e-03.*; set score_kernel=auto"):
            select.choose_kernel(CPU, torch.float32, SHAPE)

    def test_kernels_that_do_not_compile_are_not(self, monkeypatch, caplog):
        from llip.open_clip.kernels import launch

        def broken(*args, **options):
            raise RuntimeError("PassManager::run failed\nwith a long tail")

        monkeypatch.setattr(launch, "kernel_scores", broken)
        agrees, reason = select._compare(CPU, torch.float32, SHAPE, "highest")
        assert not agrees
        assert reason == "the kernels fail with RuntimeError: PassManager::run failed"
        assert reason in caplog.text
