"""The program on a tiny checkpoint and shards made on the spot."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import llip
from llip.tools.diagnose.__main__ import main
from llip.tools.diagnose.collect import collect
from llip.tools.diagnose.report import diagnose
from tests.helpers import image_bytes, write_tar


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    torch.manual_seed(0)
    model, _, _ = llip.create_model_and_transforms(tiny_model, mixture_tokens=4, pool_heads=2)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.config, "state_dict": model.state_dict()}, path)
    return path


def sample(index, captions):
    return {"png": image_bytes(index), "json": json.dumps({"captions": captions}).encode()}


@pytest.fixture
def shards(tmp_path):
    """Ten pictures with 2 or 3 captions, one broken picture, one without captions."""
    good = [sample(i, [f"caption {n} of {i}" for n in range(2 + i % 2)]) for i in range(10)]
    damaged = [{**sample(10, ["x"]), "png": b"broken"}, sample(11, [])]
    write_tar(tmp_path / "0.tar", good[:4] + damaged)
    write_tar(tmp_path / "1.tar", good[4:])
    return str(tmp_path / "{0..1}.tar")


def test_collects_images_with_all_captions(checkpoint, shards):
    model = llip.load_pretrained(checkpoint)
    collected = collect(model, shards, "json.captions", images=8, captions_per_image=2)
    assert collected.h.shape == (8, 4, 16)
    assert collected.owners.tolist() == [i for i in range(8) for _ in range(2)]
    assert sum(collected.damage.values()) == 2
    with torch.no_grad():
        expected = model.encode_text(model.tokenizer(["caption 0 of 5", "caption 1 of 5"]))
    torch.testing.assert_close(collected.t[10:12], expected)
    assert len(collect(model, shards, "json.captions", images=512, captions_per_image=4).t) == 25


def test_report_against_numpy(checkpoint, shards):
    model = llip.load_pretrained(checkpoint)
    collected = collect(model, shards, "json.captions", images=10, captions_per_image=3)
    report = diagnose(model, collected)
    with torch.no_grad():
        z = model.contextualize(collected.h, collected.t).double().numpy()  # [10, 25, 16]
        weights = model.mixture_weights(collected.h, collected.t).double().numpy()
    owners = collected.owners.numpy()
    np.testing.assert_allclose(report["usage"], weights.mean(axis=(0, 1, 2)), rtol=1e-4)
    own = z[owners, np.arange(25)]
    within = [own[owners == i].var(axis=0).sum() for i in range(10)]
    assert report["z_variance_over_own_texts"] == pytest.approx(np.mean(within), rel=1e-3)
    values = np.linalg.svd(own - own.mean(axis=0), compute_uv=False) / 5
    np.testing.assert_allclose(report["singular_values"], values, atol=1e-5)
    per_image = weights.mean(axis=(1, 2))
    effective = np.exp(-(per_image * np.log(per_image)).sum(-1))
    assert report["effective_per_image"]["mean"] == pytest.approx(effective.mean(), rel=1e-4)
    assert report["effective_per_image"]["median"] == pytest.approx(np.median(effective), rel=1e-4)
    per_text = weights.mean(axis=(0, 2))
    assert report["effective_per_text"]["mean"] == pytest.approx(
        np.exp(-(per_text * np.log(per_text)).sum(-1)).mean(), rel=1e-4
    )


def test_program_writes_json_and_figure(checkpoint, shards, tmp_path, capsys):
    command = [str(checkpoint), "--data", shards, "--caption-keys", "json.captions", "--out", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/diagnosis.json").read_text())
    assert printed["images"] == 10
    assert Image.open(tmp_path / "out/diagnosis.png").size[0] > 1000
    assert main(command[:-2]) == 0
    table = capsys.readouterr().out
    assert "effective rank" in table
    assert "unusable" in table


def test_captions_that_attend_to_patches(tmp_path, tiny_model, shards, capsys):
    model, _, _ = llip.create_model_and_transforms(tiny_model, pooling="flair", pair_tokens="both", pool_heads=2)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    command = [str(tmp_path / "c.pt"), "--data", shards, "--caption-keys", "json.captions", "--out", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["usage"]) == model.visual.output_tokens > 1
    assert 0.5 < sum(report["usage"]) < 1  # the rest attends to nothing


def test_a_plain_open_clip_model(plain_model, shards, capsys):
    assert main([str(plain_model), "--data", shards, "--caption-keys", "json.captions", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pooling"], report["mixture_tokens"], report["images"]) == ("first", 1, 10)
    assert report["z_variance_over_texts"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "nowhere/*.tar"}, "matches no file"),
        ({"--caption-keys": "txt"}, "0 usable samples"),
        ({"--caption-keys": "json"}, "caption_keys"),
        ({"--images": "1"}, "--images 1"),
    ],
)
def test_mistakes_are_reported(checkpoint, shards, capsys, change, message):
    options = {"--data": shards, "--caption-keys": "json.captions"} | change
    assert main([str(checkpoint), *(word for pair in options.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
