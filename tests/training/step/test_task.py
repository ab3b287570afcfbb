"""Loss and gradients do not depend on how the batch is spread over processes and accumulation slices."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from llip.open_clip.factory import ModelSpec, create_model, get_tokenizer
from llip.system.processes import Processes
from llip.training.step.accumulation import backward_step
from llip.training.step.task import ContrastiveTask
from tests.helpers import TINY_MODEL

BATCH = 8


def make_batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    return images, get_tokenizer(context_length=12)([f"{word} things" for word in words])


def loss_and_gradients(rank, count, loss, pooling, accum, patch_dropout=0.0):
    """One backward pass of this process's share, through the DDP-wrapped task as the trainer does it."""
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "image_size": 64, "patch_size": 16, "patch_dropout": patch_dropout}
    spec = ModelSpec({**TINY_MODEL, "vision_cfg": vision}, 3, pooling, 4, 5.0, loss)
    model = create_model(spec).double()  # float32 rounds differently from CPU to CPU, by more than the bound
    processes = Processes(rank, count, torch.device("cpu"))
    task = ContrastiveTask(model, loss, processes).train()
    task.encode = partial(encode_double, model)
    wrapped = DistributedDataParallel(task, gradient_as_bucket_view=True) if count > 1 else task
    images, tokens = (x.chunk(count)[rank] for x in make_batch())
    images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.manual_seed(7)
    slices = list(zip(images.chunk(accum), tokens.chunk(accum), strict=True))
    value, _ = backward_step(wrapped, slices, nullcontext, lambda x: x)
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return processes.mean(value).item(), gradients


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert abs(found[1][name] - gradient).max() <= 1e-5 * abs(gradient).max(), name


@pytest.mark.parametrize("pooling", ["text", "first"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one_process(pool, loss, pooling, count):
    expected = loss_and_gradients(0, 1, loss, pooling, 1)
    for found in pool.run(loss_and_gradients, count, loss, pooling, 1):
        assert_equal(found, expected)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_is_the_larger_batch(loss, accum):
    assert_equal(loss_and_gradients(0, 1, loss, "text", accum), loss_and_gradients(0, 1, loss, "text", 1))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_accumulation_under_ddp_is_the_larger_batch(pool, loss):
    expected = loss_and_gradients(0, 1, loss, "text", 1)
    for found in pool.run(loss_and_gradients, 2, loss, "text", 2):
        assert_equal(found, expected)


def test_accumulation_replays_patch_dropout():
    """The second pass over a slice drops the patches that the first one dropped: gradients match finite differences."""
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "image_size": 64, "patch_dropout": 0.5}
    model = create_model(ModelSpec({**TINY_MODEL, "vision_cfg": vision}, 3, "text", 4, 5.0, "sigmoid")).double()
    task = ContrastiveTask(model, "sigmoid", Processes(0, 1, torch.device("cpu"))).train()
    images, tokens = make_batch()
    images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    slices = list(zip(images.chunk(2), tokens.chunk(2), strict=True))

    def value():
        torch.manual_seed(7)
        model.zero_grad()
        return backward_step(task, slices, nullcontext, lambda x: x)[0].item()

    task.encode = lambda images, tokens: encode_double(model, images, tokens)
    value()
    parameter = model.visual.proj
    gradient = parameter.grad.clone()
    direction = torch.randn_like(parameter)
    step = 1e-5
    parameter.data += step * direction
    above = value()
    parameter.data -= 2 * step * direction
    below = value()
    assert (above - below) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def encode_double(model, images, tokens):
    from llip.training.step.task import Features

    return Features(model.encode_image(images.double() / 255), model.encode_text(tokens))
