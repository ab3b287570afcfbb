"""Whole runs in this process: learning, files, resuming, and what a folder refuses."""

import json
import multiprocessing
import subprocess
import sys
import time

import pytest
import torch
import yaml

import llip
from llip.configs import Config
from llip.data.loader import CaptionedImages, make_loader
from llip.data.position import DataPosition
from llip.data.sources import parse_train_data
from llip.errors import UserError
from llip.main import main, train
from llip.open_clip.factory import get_tokenizer
from llip.open_clip.weights.load import read_checkpoint
from llip.training.checkpoints.checkpoint import list_checkpoints, newest_good_checkpoint
from llip.training.checkpoints.records import read_records
from llip.training.checkpoints.run_folder import locked_folder
from tests.helpers import tiny_run, write_captioned


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """32 pictures with captions of their own, in two shards."""
    from tests.helpers import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs"), 32, 16)


@pytest.fixture
def config(pairs, tiny_model, tmp_path):
    """A run of 6 steps that takes a second."""
    return Config(
        name="run", logs=str(tmp_path), train_data=pairs, train_num_samples=32, model=tiny_model, mixture_tokens=4,
        pool_heads=4, batch_size=16, epochs=3, lr=1e-3, warmup=2, precision="fp32", workers=0, log_steps=1,
        save_frequency=1, seed=3, report_to=(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Drawing takes longer than training here; `test_files_of_a_run` draws."""
    if request.node.name != "test_files_of_a_run":
        monkeypatch.setattr("llip.training.reporting.figures.draw_curves", lambda folder: None)


def losses(config):
    return [record["loss"] for record in read_records(config.folder / "metrics.jsonl")]


def final_state(config):
    return read_checkpoint(config.folder / "checkpoints" / "latest.pt")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_overfits_32_pairs(config, loss):
    config = config.replace(loss=loss, batch_size=32, epochs=250, lr=3e-3, wd=0.0, save_frequency=0)
    train(config, "cpu")
    model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt")
    data, tokenizer = parse_train_data(config.train_data), get_tokenizer(context_length=12)
    batch = next(iter(make_loader(CaptionedImages(config, data, tokenizer, 32, DataPosition(0)), pin=False)))

    with torch.no_grad():
        scores = model(model.normalise(batch.images), batch.tokens[:, 0])
    own = torch.arange(32)
    assert (scores.argmax(dim=1) == own).float().mean() > 0.95
    assert (scores.argmax(dim=0) == own).float().mean() > 0.95


@pytest.mark.parametrize("fill", ["repeat", "mask"])
def test_several_captions_are_logged_and_resumed(tmp_path, fill):
    data = write_captioned(tmp_path / "captioned", 32, 16)  # 1, 2, 3 or 4 captions: 1.5 of 4 places repeat on average
    config = tiny_run(
        tmp_path, train_data=data, caption_keys="json.captions", captions_per_image=4, caption_fill=fill,
        batch_size=8, accum_freq=2, save_steps=2, global_loss_weight=0.5,
    )  # fmt: skip
    train(config, "cpu")
    records = read_records(config.folder / "metrics.jsonl")
    for record in records:
        assert record["captions_per_second"] == pytest.approx(4 * record["samples_per_second"])
    repeated = [record["repeated_caption_fraction"] for record in records]
    assert sum(repeated) / len(repeated) == pytest.approx(1.5 / 4)  # whole epochs
    resumed = config.replace(name="resumed", resume=str(config.folder / "checkpoints" / "step_4.pt"))
    train(resumed, "cpu")
    losses = [record["loss"] for record in records]
    assert [record["loss"] for record in read_records(resumed.folder / "metrics.jsonl")] == losses[4:]


@pytest.mark.parametrize(("fill", "warnings"), [("repeat", 1), ("mask", 0)])
def test_mostly_repeated_captions_are_warned_of_once(tmp_path, fill, warnings):
    data = write_captioned(tmp_path / "captioned", 32, 16)  # 1, 2, 3 or 4 captions: 5.5 of 8 places repeat on average
    config = tiny_run(
        tmp_path, train_data=data, caption_keys="json.captions", captions_per_image=8, caption_fill=fill, epochs=1
    )
    train(config, "cpu")
    text = (config.folder / "log.txt").read_text()
    assert text.count("most captions are repeats") == warnings
    assert text.count("use a smaller captions_per_image or caption_fill=mask") == warnings


def test_files_of_a_run(config):
    config = config.replace(report_to=("tensorboard",))
    train(config, "cpu")
    folder = config.folder
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["samples_seen"] for record in records] == [16 * i for i in range(1, 7)]
    wanted = "step samples_seen epoch loss lr grad_norm logit_scale logit_bias samples_per_second data_wait_fraction"
    assert set(wanted.split()) | {"seconds"} <= set(records[0])
    assert records[0]["lr"] == pytest.approx(5e-4)
    assert records[1]["lr"] == pytest.approx(1e-3)
    assert records[-1]["lr"] < 2e-4
    assert Config(**yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_6.pt", "step_4.pt", "step_2.pt"]
    assert (folder / "checkpoints" / "latest.pt").read_bytes() == (folder / "checkpoints" / "step_6.pt").read_bytes()
    assert (folder / "figures" / "curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").glob("events*"))
    assert "checkpoint of step 6" in (folder / "log.txt").read_text()


def test_a_finished_run_says_so(config, capsys):
    train(config, "cpu")
    before = (config.folder / "metrics.jsonl").read_bytes()
    train(config, "cpu")
    assert "finished already: nothing to do" in (config.folder / "log.txt").read_text()
    assert (config.folder / "metrics.jsonl").read_bytes() == before


class Stop(Exception):
    """Ends a run in the middle of a step, as a kill would."""


def interrupt_after(steps):
    def on_step(result):
        if result.step == steps:
            raise Stop

    return on_step


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [{}, {"accum_freq": 2, "batch_size": 8, "patch_dropout": 0.5, "loss": "softmax"}])
def test_interrupted_and_resumed_is_uninterrupted(config, tmp_path, workers, changes):
    plain = {"batch_size": 10, "train_num_samples": 30}
    config = config.replace(workers=workers, save_steps=1, report_to=(), **(changes or plain))
    straight, broken = config.replace(name="straight"), config.replace(name="broken")
    train(straight, "cpu")
    with pytest.raises(Stop):
        train(broken, "cpu", on_step=interrupt_after(config.total_steps - 2))
    # lose the newest checkpoint too: its step is logged, and must be logged once after the restart
    list_checkpoints(broken.folder / "checkpoints")[0].unlink()
    train(broken, "cpu")
    assert losses(broken) == losses(straight)
    for name, tensor in final_state(straight).items():
        assert torch.equal(tensor, final_state(broken)[name]), name


def test_another_number_of_workers_goes_on_and_says_how(config):
    with pytest.raises(Stop):
        train(config, "cpu", on_step=interrupt_after(4))
    train(config.replace(workers=2), "cpu")
    text = (config.folder / "log.txt").read_text()
    assert "resumed at step 4 of 6" in text
    resharded = (
        "the rest of the epoch is resharded from 1 processes x 1 workers to 1 x 2 (0 samples repeated, 0 skipped)"
    )
    assert resharded in text
    assert "workers changed from 0 to 2" in text


def test_a_damaged_latest_checkpoint_is_passed_over(config):
    train(config, "cpu")
    folder = config.folder / "checkpoints"
    newest = folder / "step_6.pt"
    newest.write_bytes(newest.read_bytes()[:2000])  # latest.pt is the same file
    path, content, warnings = newest_good_checkpoint(folder)
    assert (path.name, content["step"]) == ("step_4.pt", 4)
    assert "step_6.pt" in warnings[0]
    assert "damaged" in warnings[0]
    for path in folder.glob("*.pt"):
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match="no checkpoint of the run can be read"):
        newest_good_checkpoint(folder)


def test_keep_checkpoints(config):
    train(config.replace(save_steps=1, keep_checkpoints=2), "cpu")
    names = [path.name for path in list_checkpoints(config.folder / "checkpoints")]
    assert names == ["step_6.pt", "step_5.pt"]


def test_checkpoint_holds_only_tensors_and_containers(config):
    train(config, "cpu")
    checkpoint = torch.load(config.folder / "checkpoints" / "latest.pt", weights_only=True)
    assert checkpoint["step"] == 6
    assert checkpoint["config"]["lr"] == 1e-3
    assert checkpoint["model"]["mixture_tokens"] == 4


def test_a_folder_belongs_to_one_experiment(config):
    train(config, "cpu")
    with pytest.raises(UserError, match=r"lr: 0.001 -> 0.002.*seed: 3 -> 4.*name=NAME"):
        train(config.replace(lr=2e-3, seed=4), "cpu")
    with pytest.raises(UserError, match="global batch: 16 -> 32"):
        train(config.replace(batch_size=32), "cpu")
    with pytest.raises(UserError, match="epochs: 3 -> 2"):
        train(config.replace(epochs=2), "cpu")
    with pytest.raises(UserError, match="resume=none"):
        train(config.replace(resume=None), "cpu")
    train(config.replace(epochs=4, log_steps=2), "cpu")
    text = (config.folder / "log.txt").read_text()
    assert "epochs grows from 3 to 4" in text
    assert "log_steps changed from 1 to 2" in text


def test_resume_from_a_path(config, tmp_path):
    train(config, "cpu")
    other = config.replace(name="other", epochs=5, resume=str(config.folder / "checkpoints" / "latest.pt"))
    train(other, "cpu")
    assert [record["step"] for record in read_records(other.folder / "metrics.jsonl")] == [7, 8, 9, 10]


def _hold(folder, ready):
    with locked_folder(folder):
        ready.set()
        time.sleep(60)


@pytest.mark.slow
def test_a_folder_in_use_says_who_holds_it(config):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(config.folder, ready), daemon=True)
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
            train(config, "cpu")
    finally:
        holder.kill()
        holder.join(10)
    train(config, "cpu")  # the lock died with its process


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "nowhere/{0..3}.tar"}, "4 of 4 shards are missing"),
        ({"train_data": ""}, "train_data is empty"),
        ({"batch_size": 64}, "train_num_samples = 32 is less than one global batch of 64"),
        ({"model": "ViT-B-61"}, "unknown model 'ViT-B-61'"),
        ({"pretrained": "nowhere.pt"}, "neither a file nor a tag"),
        ({"resume": "nowhere.pt"}, "is not there"),
        ({"caption_keys": "json.captions"}, "wanted an image .*json field 'captions'.*member names seen: png, txt"),
        ({"nodes": 2}, "found one machine with .* nodes=1 ngpus=1"),
        ({"ngpus": 2, "device": "cuda"}, "asks for 2 GPUs on this machine, found 0.*accum_freq=2 restores it"),
        ({"eval_steps": 2, "evals": ("nowhere.yaml",)}, "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_message(config, changes, message, capsys, tmp_path):
    file = tmp_path / "config.py"
    fields = ", ".join(f"{key}={value!r}" for key, value in vars(config.replace(**changes)).items())
    file.write_text(f"from llip.configs import Config\ndef run():\n    return Config({fields})\n")
    assert main([f"{file}:run"]) == 2
    error = capsys.readouterr().err
    import re

    assert re.search("error: .*" + message, error), error
    assert "Traceback" not in error


def test_everything_else_is_checked_before_scenes_are_rendered(config, tmp_path, monkeypatch):
    monkeypatch.setattr("llip.scenes.ensure_scenes", lambda folder: pytest.fail("rendered"))
    (tmp_path / "own.py").write_text("Own = 1\n")
    scenes = config.replace(train_data=f"scenes:{tmp_path}/scenes")
    for changes, message in (
        ({"eval_steps": 2, "evals": ("nowhere.yaml",)}, "nowhere.yaml"),
        ({"pooling": f"{tmp_path}/own.py:Own"}, "expected a class"),
        ({"model": "ViT-B-61"}, "unknown model"),
        ({"batch_size": 64}, "less than one global batch"),
    ):
        with pytest.raises(UserError, match=message):
            train(scenes.replace(**changes), "cpu")


def test_unwritable_logs_folder(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*logs=DIR"):
        train(config.replace(logs=str(tmp_path / "file")), "cpu")


def test_repeated_data_are_announced(config):
    train(config.replace(train_num_samples=96, epochs=1), "cpu")
    assert "each epoch repeats the data 3.00 times" in (config.folder / "log.txt").read_text()


@pytest.mark.slow
def test_gradient_checkpointing_and_bf16_run(config):
    train(config, "cpu")
    checkpointed = config.replace(name="checkpointed", grad_checkpointing=True)
    train(checkpointed, "cpu")
    assert losses(checkpointed) == pytest.approx(losses(config), rel=1e-5)
    half = config.replace(name="half", precision="amp_bf16")
    train(half, "cpu")
    assert losses(half) == pytest.approx(losses(config), rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_mistake_of_two_processes_is_told_once(config, tmp_path):
    """How two processes train together is in `test_survival`."""
    train(config.replace(name="two"), "cpu")
    file = tmp_path / "config.py"
    two = config.replace(batch_size=8, device="cpu", ngpus=2, name="two", lr=1.0)
    fields = ", ".join(f"{key}={value!r}" for key, value in vars(two).items())
    file.write_text(f"from llip.configs import Config\ndef run():\n    return Config({fields})\n")
    command = [sys.executable, "-m", "llip.main", f"{file}:run"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert failed.returncode == 2
    assert failed.stderr.count("belongs to another experiment (lr: 0.001 -> 1.0)") == 1
    assert "Traceback" not in failed.stderr


def test_online_evaluation_is_recorded_and_changes_nothing(config, pairs, tmp_path):
    folder = pairs.rsplit("/", 1)[0]
    entry = {"type": "retrieval", "path": folder, "split": "*.tar", "metric": "recall"}
    (tmp_path / "catalog.json").write_text(json.dumps({"pairs": entry}))
    (tmp_path / "online.yaml").write_text(
        f"eval_name: mc\ncatalog_name: {tmp_path}/catalog.json\ntasks: [pairs]\nbatch_size: 8\nworkers: 0\n"
    )
    train(config, "cpu")
    watched = config.replace(name="watched", eval_steps=4, evals=(f"{tmp_path}/online.yaml",))
    train(watched, "cpu")
    records = read_records(watched.folder / "evals.jsonl")
    assert [(record["step"], record["task"]) for record in records] == [(4, "pairs"), (6, "pairs")]
    assert all(0 <= value <= 1 for record in records for value in record["values"].values())
    assert losses(watched) == losses(config)
