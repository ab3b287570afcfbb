"""What only a CUDA device can show: the same numbers as on the CPU, and few waits of the host for the device."""

import warnings

import pytest
import torch

from llip.main import main, train
from llip.open_clip.pooling import create_pooling, unit_norm
from llip.training.checkpoints.records import read_records
from tests.helpers import config_file, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of scores in [-1, 1]: a few roundings of the dtype of keys and values."""


def scores_and_gradients(pooling, h, t, upstream):
    h, t = h.clone().requires_grad_(), t.clone().requires_grad_()
    pooling.zero_grad()
    scores = pooling.scores(h, t)
    (scores * upstream).sum().backward()
    gradients = [h.grad, t.grad, *(parameter.grad.clone() for parameter in pooling.parameters())]
    return scores.detach(), gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("images", "texts", "tokens", "width"), [(5, 33, 8, 64), (64, 512, 32, 512)])
def test_scores_are_those_of_the_cpu_in_float64(dtype, images, texts, tokens, width):
    torch.manual_seed(0)
    pooling = create_pooling("text", tokens, width, 8, 2.0).double()
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    h, t = torch.randn(images, tokens, width).double(), unit_norm(torch.randn(texts, width)).double()
    upstream = torch.randn(images, texts).double()
    expected, expected_gradients = scores_and_gradients(pooling, h, t, upstream)

    pooling = pooling.float().to(DEVICE)
    h, t, upstream = (x.float().to(DEVICE) for x in (h, t, upstream))
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        scores, gradients = scores_and_gradients(pooling, h, t, upstream)
    torch.testing.assert_close(scores.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=0)
    for measured, reference in zip(gradients, expected_gradients, strict=True):
        error = (measured.cpu().double() - reference).norm() / reference.norm()
        assert error < 2 * TOLERANCE[dtype]


def losses(folder):
    return [record["loss"] for record in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("changes", [{}, {"accum_freq": 2, "batch_size": 8}, {"loss": "softmax"}, {"workers": 2}])
def test_a_run_has_the_losses_of_the_cpu(tmp_path, changes):
    reference = tiny_run(tmp_path, name="cpu", **changes)
    train(reference, "cpu")
    train(reference.replace(name="gpu", device=DEVICE), DEVICE)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_an_interrupted_run_is_the_undisturbed_one(tmp_path, precision):
    changes = {"precision": precision, "deterministic": True, "save_steps": 3, "device": DEVICE}
    whole = tiny_run(tmp_path, name="whole", **changes)
    train(whole, DEVICE)

    class Stopped(Exception):
        pass

    def stop(result):
        if result.step == 4:
            raise Stopped

    halved = whole.replace(name="halved")
    with pytest.raises(Stopped):
        train(halved, DEVICE, on_step=stop)
    train(halved, DEVICE)
    weights = [torch.load(tmp_path / name / "checkpoints/latest.pt", weights_only=True) for name in ("whole", "halved")]
    torch.testing.assert_close(weights[0]["state_dict"], weights[1]["state_dict"], atol=0, rtol=0)


def test_the_host_waits_for_the_device_once_a_step(tmp_path):
    config, waits = tiny_run(tmp_path, epochs=10, log_steps=0, device=DEVICE), {}

    def count(result):
        waits[result.step] = sum("synchroniz" in str(warning.message) for warning in caught)
        caught.clear()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(config, DEVICE, on_step=count)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [waits[step] for step in range(5, 20)] == [1] * 15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_have_the_losses_of_two_cpu_processes(tmp_path):
    for device in ("cpu", DEVICE):
        config = tiny_run(tmp_path, name=device, ngpus=2, batch_size=8, device=device)
        assert main([config_file(tmp_path / f"{device}.py", config)]) == 0
    assert losses(tmp_path / DEVICE) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
