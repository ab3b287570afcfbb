"""Numbers that are not finite: skipped, counted, and in the end explained; and checkpoints that cannot be written."""

import itertools
import json
import math
import resource

import pytest
import torch

from llip.configs import Config
from llip.errors import RunError
from llip.main import train
from llip.open_clip.model import Llip
from llip.open_clip.weights.load import read_checkpoint
from llip.system.processes import Processes
from llip.training import trainer
from llip.training.checkpoints.records import read_records
from llip.training.debug import replay
from tests.helpers import write_pairs


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    return Config(
        name="run", logs=str(tmp_path), train_data=write_pairs(tmp_path / "pairs", 32, 16), train_num_samples=32,
        model=tiny_model, mixture_tokens=4, pool_heads=4, batch_size=16, epochs=3, lr=1e-3, warmup=2, precision="fp32",
        workers=0, log_steps=1, save_frequency=0, seed=3, report_to=(), max_bad_steps=3,
    )  # fmt: skip


def spoil(monkeypatch, steps):
    """Make the loss and the gradients of some calls of the backward pass not finite."""
    backward, calls = trainer.backward_step, iter(range(10_000))

    def spoiled(task, *arguments):
        loss, report = backward(task, *arguments)
        if next(calls) in steps:
            loss = loss * math.nan
            next(task.parameters()).grad.fill_(math.inf)
        return loss, report

    monkeypatch.setattr(trainer, "backward_step", spoiled)


def states(config, step):
    content = read_checkpoint(config.folder / "checkpoints" / f"step_{step}.pt")
    return content["state_dict"], content["optimizer"]["state"]


def test_a_bad_step_changes_nothing_and_is_counted(config, monkeypatch):
    config = config.replace(save_steps=1, keep_checkpoints=0)
    spoil(monkeypatch, {2})
    train(config, "cpu")
    records = read_records(config.folder / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["loss"] is None for record in records] == [False, False, True, False, False, False]
    (before, moments_before), (after, moments_after) = states(config, 2), states(config, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for index in moments_before:
        assert all(torch.equal(moments_before[index][key], moments_after[index][key]) for key in moments_before[index])
    following = states(config, 4)[0]
    assert not all(torch.equal(after[name], following[name]) for name in after)
    assert "step 3 is skipped: loss or gradient is not finite (1 in a row)" in (config.folder / "log.txt").read_text()


def test_a_skipped_step_leaves_the_average_of_the_weights_and_the_logit_scale(config, monkeypatch):
    """The average would otherwise move towards weights that the step did not change."""
    config = config.replace(save_steps=1, keep_checkpoints=0, ema_decay=0.5)
    clamped, clamp = [], Llip.clamp_logit_scale
    monkeypatch.setattr(Llip, "clamp_logit_scale", lambda model: (clamped.append(1), clamp(model)))
    spoil(monkeypatch, {2, 4})
    train(config, "cpu")
    averages = [
        read_checkpoint(config.folder / "checkpoints" / f"step_{step}.pt")["ema_state_dict"] for step in range(1, 7)
    ]
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(averages)
    ]
    assert moved == [True, False, True, False, True]  # steps 2 to 6
    assert len(clamped) == 4


def test_bad_steps_that_are_not_in_a_row_do_not_end_a_run(config, monkeypatch):
    spoil(monkeypatch, {0, 1, 3, 4})
    train(config, "cpu")
    assert read_records(config.folder / "metrics.jsonl")[-1]["skipped_steps"] == 4


def test_too_many_in_a_row_end_the_run_with_a_nan_dump(config, monkeypatch):
    spoil(monkeypatch, {2, 3, 4})
    with pytest.raises(RunError) as raised:
        train(config, "cpu")
    message = str(raised.value)
    folder = config.folder / "nan_dumps" / "step_5"
    for part in (
        "for 3 steps in a row (max_bad_steps)", "step 5", "loss not finite on processes 0", "logit scale ",
        "gradient norm inf", "largest gradients: ", "samples of process 0: 0000", "and 11 more",
        f"llip replay {folder}",
    ):  # fmt: skip
        assert part in message, part
    record = json.loads((folder / "record.json").read_text())
    assert record["losses"] == ["nan"]
    assert len(record["samples"][0][0]) == 16
    assert record["config"]["lr"] == config.lr
    assert next(iter(record["gradient_norms"].values())) == "inf"


REPLAYED = [
    {},
    {"accum_freq": 2, "batch_size": 8, "patch_dropout": 0.5, "loss": "softmax"},
    {"accum_freq": 2, "batch_size": 8, "captions_per_image": 3, "caption_fill": "mask", "global_loss_weight": 0.5},
]


@pytest.mark.parametrize("changes", REPLAYED)
def test_a_replay_computes_the_step_again(config, changes, monkeypatch, capsys):
    config = config.replace(max_bad_steps=1, **changes)
    backward, seen = trainer.backward_step, {}

    def note(task, *arguments):  # the numbers of the step are fine: only their judgement is spoilt
        loss, report = backward(task, *arguments)
        norms = [parameter.grad.norm() for parameter in task.parameters() if parameter.grad is not None]
        seen.update(loss=loss.item(), norm=torch.stack(norms).norm().item())
        return loss, report

    monkeypatch.setattr(trainer, "backward_step", note)
    calls = iter(range(10_000))
    monkeypatch.setattr(Processes, "all_reduce_max", lambda self, values: [float(next(calls) == 2), *list(values)[1:]])
    with pytest.raises(RunError):
        train(config, "cpu")
    monkeypatch.undo()
    capsys.readouterr()
    assert replay.main([str(config.folder / "nan_dumps" / "step_3"), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == pytest.approx(seen["loss"], rel=1e-6)
    assert result["grad_norm"] == pytest.approx(seen["norm"], rel=1e-5)
    assert not result["reproduced"]


def test_a_dump_of_version_0_1_is_replayed(config, monkeypatch, capsys):
    """It has pairs of images and token ids [B, C], and knows nothing of several captions."""
    spoil(monkeypatch, {2})
    with pytest.raises(RunError):
        train(config.replace(max_bad_steps=1), "cpu")
    monkeypatch.undo()
    folder = config.folder / "nan_dumps" / "step_3"

    def loss():
        capsys.readouterr()
        assert replay.main([str(folder), "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["loss"]

    expected = loss()
    part = read_checkpoint(folder / "process_0.pt")
    part["slices"] = [(images, tokens[:, 0]) for images, tokens, _ in part["slices"]]
    torch.save(part, folder / "process_0.pt")
    record = json.loads((folder / "record.json").read_text())
    for name in ("captions_per_image", "caption_fill", "global_loss_weight"):
        del record["config"][name]
    (folder / "record.json").write_text(json.dumps(record))
    assert loss() == expected


def test_a_replay_names_the_module_and_the_sample(config, monkeypatch, capsys):
    """A weight that is not finite from the start: found in the first module that uses it."""
    encode = Llip.encode_image

    def poisoned(self, images):
        with torch.no_grad():
            self.visual.ln_post.weight[0] = math.nan
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Llip, "encode_image", poisoned)
        with pytest.raises(RunError, match=r"largest weights: visual.ln_post.weight nan"):
            train(config, "cpu")
    assert replay.main([str(config.folder / "nan_dumps" / "step_3"), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "\nnot finite again\n" in text
    assert "first module whose output is not finite: visual.ln_post (in 1 slices)" in text
    assert "and 8 more" in text


def test_a_replay_of_nothing_is_one_message(tmp_path, capsys):
    assert replay.main([str(tmp_path)]) == 2
    assert "is no nan dump" in capsys.readouterr().err


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_warning_until_the_last_checkpoint(config, small_files):
    config = config.replace(save_steps=2)

    def fill(result):
        if result.step == 2:
            small_files()

    with pytest.raises(RunError, match=r"step_6.pt cannot be written.*newest one is of step 2.*the same command"):
        train(config, "cpu", on_step=fill)
    text = (config.folder / "log.txt").read_text()
    assert "step_4.pt cannot be written" in text
    assert "Training continues" in text
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == ["latest.pt", "step_2.pt"]


def test_provenance_is_in_the_checkpoint_and_a_change_is_logged(config, monkeypatch):
    spoil(monkeypatch, {2, 3, 4})
    with pytest.raises(RunError):
        train(config.replace(save_steps=1), "cpu")
    monkeypatch.undo()
    monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)
    provenance = read_checkpoint(config.folder / "checkpoints" / "step_4.pt")["provenance"]
    assert provenance["torch"] == torch.__version__.split("+")[0] or provenance["torch"] == torch.__version__
    assert {"commit", "python", "host", "data", "processes"} <= provenance.keys()
    monkeypatch.setattr("llip.training.checkpoints.provenance.platform.node", lambda: "elsewhere")
    train(config.replace(save_steps=1), "cpu")
    text = (config.folder / "log.txt").read_text()
    assert f"changed since the checkpoint: host: {provenance['host']!r} -> 'elsewhere'" in text
    assert "commit" not in text


def test_records_that_do_not_fit_on_the_disk_do_not_end_a_run(config, monkeypatch):
    config.folder.mkdir()
    (config.folder / "metrics.jsonl").symlink_to("/dev/full")
    (config.folder / "sample_ids").mkdir()
    (config.folder / "sample_ids" / "process_0.jsonl").symlink_to("/dev/full")
    train(config.replace(log_sample_ids=True), "cpu")
    text = (config.folder / "log.txt").read_text()
    assert text.count("metrics.jsonl cannot be written") == 1
    assert text.count("process_0.jsonl cannot be written") == 1
    assert "metrics.jsonl lacks the last 6 records" in text
    assert "process_0.jsonl lacks the last 6 records" in text
    assert (config.folder / "checkpoints" / "step_6.pt").is_file()
