"""What a run can do beside its steps: average weights, lock towers, report, profile, measure mixture and speed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3

import llip
from llip.config_checks import parse_window
from llip.configs import Config
from llip.errors import UserError
from llip.main import train
from llip.open_clip.weights.load import read_checkpoint
from llip.training.checkpoints.records import read_records
from tests.helpers import write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 32, 16)


@pytest.fixture
def config(tiny_model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    return Config(
        name="run", logs=str(tmp_path), train_data=pairs, train_num_samples=32, model=tiny_model, mixture_tokens=4,
        pool_heads=4, batch_size=16, epochs=3, lr=1e-3, warmup=2, precision="fp32", workers=0, log_steps=1,
        save_frequency=0, save_steps=1, keep_checkpoints=0, seed=3, report_to=(),
    )  # fmt: skip


def checkpoint(config, step):
    return read_checkpoint(config.folder / "checkpoints" / f"step_{step}.pt")


def stop_at(number):
    def on_step(result):
        if result.step == number:
            raise KeyboardInterrupt

    return on_step


def test_the_average_is_that_of_the_weights_and_survives_a_restart(config):
    config = config.replace(ema_decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(config, "cpu", on_step=stop_at(4))
    train(config, "cpu")
    decay_of = ModelEmaV3(torch.nn.Linear(1, 1), 0.9, use_warmup=True).get_decay
    wanted = {name: tensor.double() for name, tensor in checkpoint(config, 1)["state_dict"].items()}
    for step in range(2, 7):
        for name, tensor in checkpoint(config, step)["state_dict"].items():
            wanted[name] = decay_of(step) * wanted[name] + (1 - decay_of(step)) * tensor.double()
    averaged = checkpoint(config, 6)["ema_state_dict"]
    for name, tensor in wanted.items():
        torch.testing.assert_close(averaged[name].double(), tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["visual.conv1.weight"], checkpoint(config, 6)["state_dict"]["visual.conv1.weight"])


def test_the_average_can_be_loaded(config):
    train(config.replace(ema_decay=0.9), "cpu")
    path = config.folder / "checkpoints" / "latest.pt"
    saved = read_checkpoint(path)
    for ema, key in ((False, "state_dict"), (True, "ema_state_dict")):
        model = llip.load_pretrained(path, ema=ema)
        assert torch.equal(model.visual.conv1.weight, saved[key]["visual.conv1.weight"])
    train(config.replace(name="plain"), "cpu")
    with pytest.raises(UserError, match="holds no average of its weights"):
        llip.load_pretrained(config.replace(name="plain").folder / "checkpoints" / "latest.pt", ema=True)


@pytest.mark.parametrize("changes", [{}, {"accum_freq": 2, "batch_size": 8}])
def test_a_locked_tower_keeps_its_weights(config, changes):
    config = config.replace(lock_image=True, **changes)
    train(config, "cpu")
    before, after = checkpoint(config, 1)["state_dict"], checkpoint(config, 6)["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith("visual.")} == {"visual.class_embedding"}
    assert any(name.startswith("text.") for name in changed)
    assert any(name.startswith("pooling.") for name in changed)


def test_the_log_tells_speed_and_mixture(config):
    train(config, "cpu")
    record = read_records(config.folder / "metrics.jsonl")[-1]
    rate = record["samples_per_second"]
    assert record["tokens_per_second"] == pytest.approx(rate * (4 + 4 + 12))  # 4 patches, 4 mixture tokens, 12 words
    assert record["tflops"] > 0
    assert record["mfu"] is None  # of a CPU
    assert 1 <= record["mixture_usage_effective"] <= 4
    assert -1 <= record["mixture_token_similarity"] <= 1
    train(config.replace(name="first", pooling="first", mixture_tokens=1), "cpu")
    first = read_records(config.replace(name="first").folder / "metrics.jsonl")[-1]
    assert not any(name.startswith("mixture_") for name in first)


@pytest.mark.slow
def test_a_profile_of_some_steps(config):
    train(config.replace(profile_steps="2-3"), "cpu")
    folder = config.folder / "profile"
    assert "aten::" in (folder / "steps_2-3.txt").read_text()
    import gzip

    trace = json.loads(gzip.decompress((folder / "steps_2-3.json.gz").read_bytes()))
    assert len(trace["traceEvents"]) > 100


@pytest.mark.parametrize("text", ["0-3", "5-4", "x", "3-", "-1"])
def test_a_window_that_is_none(text):
    with pytest.raises(UserError, match="profile_steps"):
        parse_window(text)
    assert parse_window("7") == (7, 7)


class FakeWandb:
    """Stands for the package, which tests must not need."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        self.ids, self.logged, self.finished = [], [], 0

    def init(self, id, resume, name, dir, config):
        assert resume == "allow"
        self.ids.append(id)
        return SimpleNamespace(
            define_metric=lambda *a, **k: None, log=self.logged.append, finish=lambda: setattr(self, "finished", 1)
        )


def test_weights_and_biases_keeps_its_run_over_a_restart(config, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config.replace(report_to=("wandb",))
    with pytest.raises(KeyboardInterrupt):
        train(config, "cpu", on_step=stop_at(4))
    train(config, "cpu")
    assert fake.ids[0] == fake.ids[1]
    assert [values["step"] for values in fake.logged] == [1, 2, 3, 4, 5, 6]
    assert fake.logged[-1]["train/loss"] == read_records(config.folder / "metrics.jsonl")[-1]["loss"]
    assert fake.finished


def test_a_missing_package_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(config.replace(report_to=("wandb",)), "cpu")


def test_an_older_versions_folder_goes_on(config):
    """Its config.yaml does not have the fields that came later."""
    import yaml

    train(config, "cpu")
    path = config.folder / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    for name in ("lock_image", "layer_decay", "ema_decay", "max_bad_steps", "report_to"):
        del fields[name]
    path.write_text(yaml.safe_dump(fields))
    train(config.replace(report_to=("tensorboard",)), "cpu")
    text = (config.folder / "log.txt").read_text()
    assert "finished already" in text
    assert "changed from" not in text
