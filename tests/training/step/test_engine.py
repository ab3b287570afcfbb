"""Weights in shares (FSDP2) train as whole ones do (DDP), and the files of both are the same."""

import json
from contextlib import contextmanager

import pytest
import torch
import yaml

from llip.configs import Config
from llip.errors import RunError, UserError
from llip.open_clip.weights.load import read_checkpoint
from llip.system.processes import Processes
from llip.training.checkpoints.records import read_records
from tests.helpers import write_pairs

ENGINES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 32, 16)


@pytest.fixture
def config(tiny_model, pairs, tmp_path):
    """A run of 6 steps of two processes; no number of mixture tokens, rows or channels is even everywhere."""
    return Config(
        name="run", logs=str(tmp_path), train_data=pairs, train_num_samples=32, model=tiny_model, mixture_tokens=3,
        pool_heads=4, batch_size=8, ngpus=2, device="cpu", epochs=3, lr=1e-3, warmup=2, precision="fp32", workers=0,
        log_steps=1, save_frequency=0, save_steps=3, keep_checkpoints=0, seed=3, report_to=(), grad_clip=0.5,
    )  # fmt: skip


def train_together(rank, count, configs):
    """Run each config as one of the pool's processes; returns what ended each run, None where it came to its end."""
    from llip import main
    from llip.training.distributed import processes as distributed
    from llip.training.reporting import figures

    @contextmanager
    def joined(config, device):
        yield Processes(rank, count, torch.device("cpu"))

    distributed.join_processes = joined  # the pool has joined them already
    figures.draw_curves = lambda folder: None
    ends = []
    for config in configs:
        try:
            main.train(config, "cpu")
            ends.append(None)
        except (RunError, UserError) as error:
            ends.append(str(error))
    return ends


def both(config, **changes):
    """The same run under both engines."""
    return [config.replace(name=name, distributed_engine=name, **changes) for name in ENGINES]


def column(config, name):
    return [record[name] for record in read_records(config.folder / "metrics.jsonl")]


def saved(config, step=6):
    return read_checkpoint(config.folder / "checkpoints" / f"step_{step}.pt")


def assert_same_training(found, expected, steps=6, rtol=1e-5):
    for name in ("loss", "grad_norm", "logit_scale"):
        assert column(found, name) == pytest.approx(column(expected, name), rel=rtol), name
    assert len(column(found, "loss")) == steps
    weights, wanted = saved(found)["state_dict"], saved(expected)["state_dict"]
    assert list(weights) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accum_freq": 2, "batch_size": 4, "patch_dropout": 0.5},
        {"captions_per_image": 3, "caption_fill": "mask", "global_loss_weight": 0.5},
    ],
)
def test_shares_train_as_whole_weights_do(pool, config, loss, changes):
    ddp, fsdp = both(config, loss=loss, **changes)
    assert pool.run(train_together, 2, [ddp, fsdp]) == [[None, None]] * 2
    assert_same_training(fsdp, ddp)
    assert max(column(ddp, "grad_norm")) > config.grad_clip  # gradients were clipped


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lock_image": True, "layer_decay": 0.5, "grad_checkpointing": True},
        {"lock_text": True, "pooling": "learned", "accum_freq": 2, "batch_size": 4, "loss": "softmax"},
    ],
)
def test_with_locked_towers_checkpointing_and_rates_by_layer(pool, config, changes):
    ddp, fsdp = both(config, **changes)
    assert pool.run(train_together, 2, [ddp, fsdp]) == [[None, None]] * 2
    assert_same_training(fsdp, ddp)


@pytest.mark.slow
def test_bfloat16_rounds_in_the_same_places(pool, config):
    """Autocast's copies of weights outlive the weights being whole, over the slices of a step."""
    ddp, fsdp = both(config, precision="amp_bf16", accum_freq=2, batch_size=4)
    assert pool.run(train_together, 2, [ddp, fsdp]) == [[None, None]] * 2
    assert column(fsdp, "loss") == pytest.approx(column(ddp, "loss"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("first", ENGINES)
def test_a_run_goes_on_under_the_other_engine(pool, config, first):
    second = "fsdp" if first == "ddp" else "ddp"
    straight = config.replace(name="straight", distributed_engine=first)
    resume = str(straight.folder / "checkpoints" / "step_3.pt")
    other = config.replace(name="other", distributed_engine=second, resume=resume)
    assert pool.run(train_together, 2, [straight, other]) == [[None, None]] * 2
    assert column(other, "loss") == pytest.approx(column(straight, "loss")[3:], rel=1e-5)
    for name, tensor in saved(straight)["state_dict"].items():
        torch.testing.assert_close(saved(other)["state_dict"][name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    assert saved(other)["optimizer"]["param_groups"] == saved(straight)["optimizer"]["param_groups"]


@pytest.mark.slow
def test_the_same_folder_goes_on_under_the_other_engine(pool, config):
    ddp = config.replace(epochs=2)
    longer = config.replace(epochs=3, distributed_engine="fsdp")
    assert pool.run(train_together, 2, [ddp, longer]) == [[None, None]] * 2
    assert column(longer, "step") == [1, 2, 3, 4, 5, 6]
    assert "distributed_engine changed from 'ddp' to 'fsdp'" in (longer.folder / "log.txt").read_text()


def load_and_save(rank, count, config, path):
    """Load a checkpoint into shares, and give back what they would save, with the numbers this process holds."""
    from llip.open_clip.factory import create_model, model_spec
    from llip.open_clip.weights.load import load_weights
    from llip.system.processes import Processes
    from llip.training.step.create_engine import create_engine
    from llip.training.step.optimizer import create_optimizer

    content = read_checkpoint(path)
    model = create_model(model_spec(config), None, config.model)
    load_weights(model, content, "the test's checkpoint")
    engine = create_engine(config, model, Processes(rank, count, torch.device("cpu")))
    optimizer = create_optimizer(model, config)
    engine.load_optimizer_state(optimizer, content["optimizer"])
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    held = sum(getattr(t, "_local_tensor", t).numel() for t in tensors)
    held += sum(getattr(v, "_local_tensor", v).numel() for p in tensors for v in optimizer.state[p].values() if v.ndim)
    weights, state = engine.model_state(model), engine.optimizer_state(optimizer)
    whole = {name: tensor.numpy() for name, tensor in engine.full_model(model).state_dict().items()}
    moments = {i: {key: value.numpy() for key, value in one.items()} for i, one in state["state"].items()}
    return {name: t.numpy() for name, t in weights.items()}, moments, state["param_groups"], whole, held


@pytest.mark.slow
def test_nothing_is_lost_between_file_and_shares(pool, config):
    pool.run(train_together, 2, [config.replace(layer_decay=0.5)])
    path = config.folder / "checkpoints" / "step_6.pt"
    expected = read_checkpoint(path)
    fsdp = config.replace(layer_decay=0.5, distributed_engine="fsdp")
    (weights, state, groups, whole, held), other = pool.run(load_and_save, 2, fsdp, path)
    assert list(weights) == list(expected["state_dict"])
    for copy in (weights, whole, other[3]):
        assert all((copy[name] == tensor.numpy()).all() for name, tensor in expected["state_dict"].items())
    assert groups == expected["optimizer"]["param_groups"]
    assert list(state) == list(expected["optimizer"]["state"])
    for index, moments in expected["optimizer"]["state"].items():
        assert state[index].keys() == moments.keys()
        assert all((state[index][key] == value.numpy()).all() for key, value in moments.items())
    assert other[0] == other[1] == {}  # the main process alone has it
    numbers = 3 * sum(tensor.numel() for tensor in expected["state_dict"].values())
    assert abs(held - numbers / 2) < 0.1 * numbers
    assert abs(other[4] - numbers / 2) < 0.1 * numbers


@pytest.mark.slow
def test_evaluation_and_nan_dumps_have_full_weights(pool, config, pairs, tmp_path):
    """31 images: the processes have different numbers of them to encode."""
    folder = write_pairs(tmp_path / "odd", 31, 31).rsplit("/", 1)[0]
    entry = {"type": "retrieval", "path": folder, "split": "*.tar", "metric": "recall"}
    (tmp_path / "catalog.json").write_text(json.dumps({"pairs": entry}))
    yaml_file = tmp_path / "online.yaml"
    fields = {"eval_name": "mc", "catalog_name": f"{tmp_path}/catalog.json", "tasks": ["pairs"], "batch_size": 5}
    yaml_file.write_text(yaml.safe_dump({**fields, "workers": 0}))
    ddp, fsdp = both(config, eval_steps=2, evals=(str(yaml_file),), max_bad_steps=1)
    ends = pool.run(train_and_spoil, 2, [ddp, fsdp])
    results = [read_records(one.folder / "evals.jsonl") for one in (ddp, fsdp)]
    assert [(one["step"], one["task"]) for one in results[1]] == [(2, "pairs"), (4, "pairs")]
    for found, expected in zip(results[1], results[0], strict=True):
        assert found["values"] == pytest.approx(expected["values"], abs=0.04)
    assert "for 1 steps in a row" in ends[0][1]
    records = [json.loads((one.folder / "nan_dumps" / "step_5" / "record.json").read_text()) for one in (ddp, fsdp)]
    for name in ("gradient_norms", "weight_norms", "grad_norm", "logit_scale"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-4, abs=1e-6), name
    weights = [read_checkpoint(one.folder / "nan_dumps" / "step_5" / "model.pt")["state_dict"] for one in (ddp, fsdp)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def train_and_spoil(rank, count, configs):
    """Train, and judge the numbers of the fifth step as bad."""
    from llip.training import trainer

    backward, calls = trainer.backward_step, [0]

    def spoiled(*arguments):
        loss, report = backward(*arguments)
        calls[0] += 1
        return loss * (float("nan") if calls[0] % 5 == 0 else 1.0), report  # which ends each run

    trainer.backward_step = spoiled
    return train_together(rank, count, configs)


@pytest.mark.slow
def test_one_process_keeps_all_weights_and_says_so(config):
    from llip.main import train

    ddp, fsdp = both(config, ngpus=1, batch_size=16)
    for one in (ddp, fsdp):
        train(one, "cpu")
    assert column(fsdp, "loss") == column(ddp, "loss")
    assert "a single process keeps all weights" in (fsdp.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay = 0.9 with distributed_engine = 'fsdp'.*ema_decay=none"),
        ({"precision": "amp_fp16"}, "amp_fp16.*precision=amp_bf16"),
        ({"distributed_engine": "fsdp2"}, "expected one of 'ddp', 'fsdp'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**{"distributed_engine": "fsdp"} | changes)
    if "distributed_engine" not in changes:
        Config(**changes)
