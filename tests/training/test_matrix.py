"""Options that change how a run computes, and not what: each combination gives the losses of one process without them.

Compiled runs are few, as each compiles for many seconds, and their model is one whose two towers look alike to the
compiler. Without checkpointing the same graphs are compiled, less what is computed again.
"""

import itertools
import json
import shutil

import pytest

from llip.configs import Config
from llip.errors import UserError
from llip.main import train
from llip.training.checkpoints.records import read_records
from tests.helpers import TINY_MODEL, write_pairs
from tests.training.step.test_engine import saved, train_together

CHECKPOINTED = {"grad_checkpointing": True}
SLICED = {"accum_freq": 2, "batch_size": 4}
EAGER = list(itertools.product(("ddp", "fsdp"), (False, True), (False, True)))  # engine, checkpointed, in two slices

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of one process, as simple as it gets. Its two steps each see all data, whoever reads them."""
    folder = tmp_path_factory.mktemp("matrix")
    vision = TINY_MODEL["vision_cfg"] | {"layers": 1}
    text = TINY_MODEL["text_cfg"] | {"layers": 1, "width": 32, "context_length": 7}  # as many as patches and tokens
    (folder / "model.json").write_text(json.dumps(TINY_MODEL | {"vision_cfg": vision, "text_cfg": text}))
    config = Config(
        name="plain", logs=str(folder), train_data=write_pairs(folder / "pairs", 16, 8), train_num_samples=16,
        model=str(folder / "model.json"), mixture_tokens=3, pool_heads=4, batch_size=16, device="cpu", epochs=2,
        lr=1e-3, warmup=1, precision="fp32", workers=0, log_steps=1, save_frequency=1, seed=3, report_to=(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
        train(config, "cpu")
    return config


def variant(plain, engine, checkpointed, sliced, **changes):
    """The same run by two processes, with the options."""
    name = "-".join([engine, f"checkpointed_{checkpointed}", f"sliced_{sliced}", *changes])
    changes |= {"name": name, "ngpus": 2, "batch_size": 8, "distributed_engine": engine}
    return plain.replace(**changes | (CHECKPOINTED if checkpointed else {}) | (SLICED if sliced else {}))


def losses(config):
    return [(record["loss"], record["grad_norm"]) for record in read_records(config.folder / "metrics.jsonl")]


def assert_equal_losses(found, plain):
    assert len(losses(plain)) == 2
    for ours, expected in zip(losses(found), losses(plain), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    assert list(saved(found, 2)["state_dict"]) == list(saved(plain, 2)["state_dict"])


@pytest.mark.slow
def test_every_combination_without_compiling(pool, plain):
    configs = [variant(plain, *options) for options in EAGER]
    assert pool.run(train_together, 2, configs) == [[None] * len(configs)] * 2
    for config in configs:
        assert_equal_losses(config, plain)


@pytest.mark.slow
@needs_compiler
def test_compiled_whole_weights(pool, plain):
    """The average is a copy of the model, and names in the checkpoint know nothing of the compiler."""
    config = variant(plain, "ddp", True, False, torchcompile=True, ema_decay=0.9)
    assert pool.run(train_together, 2, [config]) == [[None]] * 2
    assert_equal_losses(config, plain)
    assert list(saved(config, 2)["ema_state_dict"]) == list(saved(plain, 2)["state_dict"])


@pytest.mark.slow
@needs_compiler
def test_compiled_shares(pool, plain):
    """Block by block, inside of what is checkpointed and of the hooks that make weights whole."""
    config = variant(plain, "fsdp", True, True, torchcompile=True)
    assert pool.run(train_together, 2, [config]) == [[None]] * 2
    assert_equal_losses(config, plain)


def test_without_a_compiler_the_run_is_refused(plain, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"torchcompile=true on a CPU needs a C\+\+ compiler.*torchcompile=false"):
        train(plain.replace(name="no_compiler", torchcompile=True), "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not on this machine"):
        train(plain.replace(name="no_compiler", torchcompile=True), "cpu")
