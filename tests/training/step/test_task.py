"""Loss and gradients do not depend on how the batch is spread over processes and accumulation slices."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from llip.configs import Config
from llip.data.loader import MicroBatch
from llip.open_clip.factory import ModelSpec, create_model, get_tokenizer
from llip.system.processes import Processes
from llip.training.step.accumulation import backward_step
from llip.training.step.task import ContrastiveTask, Features
from tests.helpers import TINY_MODEL

BATCH = 8
EMPTY = [1, 4, 5, 20]  # places of 8 x 3 captions that hold none of their own
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
THINGS = ["things", "people", "places"]


def make_batch(captions=1):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    tokens = get_tokenizer(context_length=12)([f"{word} {thing}" for word in WORDS for thing in THINGS[:captions]])
    mask = torch.ones(BATCH * captions, dtype=torch.bool)
    if captions > 1:
        mask[EMPTY] = False
    return MicroBatch(images, tokens.unflatten(0, (BATCH, captions)), mask.unflatten(0, (BATCH, captions)))


def cut(batch, count):
    return [MicroBatch(*parts) for parts in zip(*(part.chunk(count) for part in batch), strict=True)]


def make_model(config, patch_dropout=0.0):
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "image_size": 64, "patch_size": 16, "patch_dropout": patch_dropout}
    spec = ModelSpec({**TINY_MODEL, "vision_cfg": vision}, 3, config.pooling, 4, 5.0, config.loss, config.pair_tokens)
    return create_model(spec).double()  # float32 rounds differently from CPU to CPU, by more than the bound


def flair_loss(model, h, t, captions):
    """FLAIR's two losses over all captions, from its equations: their mean, each a sum over pairs over the captions."""
    scale, bias = model.logit_scale.exp(), model.logit_bias
    owners = torch.arange(len(t)) // captions
    signs = torch.where(owners == torch.arange(len(h))[:, None], 1.0, -1.0).double()
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True).double()
    head, losses = model.pooling, []
    z = []
    for tokens in h[:, 1:]:  # patches; the class token comes first
        inputs = head.ln_q(t * 4.0)[None], head.ln_k(tokens)[None], head.ln_v(tokens)[None]
        z.append(torch.func.functional_call(attention, dict(head.attn.named_parameters()), inputs)[0][0])
    conditioned = torch.einsum("btd,td->bt", F.normalize(torch.stack(z), dim=-1), t)
    for scores in (conditioned, F.normalize(h[:, 0], dim=-1) @ t.T):
        losses.append(-F.logsigmoid(signs * (scale * scores + bias)).sum() / len(t))
    return sum(losses) / 2


def test_flairs_loss_is_that_of_its_equations():
    config = Config(pooling="flair", pair_tokens="patches", captions_per_image=3, global_loss_weight=0.5, device="cpu")
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0}
    spec = ModelSpec({**TINY_MODEL, "vision_cfg": vision}, 1, "flair", 4, 5.0, "sigmoid", "patches")
    model = create_model(spec).double()
    for parameter in model.pooling.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    h = torch.randn(4, model.visual.output_tokens, 16, dtype=torch.float64, requires_grad=True)
    t = F.normalize(torch.randn(12, 16, dtype=torch.float64), dim=-1).requires_grad_()
    task = ContrastiveTask(model, config, Processes(0, 1, torch.device("cpu")))
    value, _ = task(mask=torch.ones(4, 3, dtype=torch.bool), features=Features(h, t))
    expected = flair_loss(model, h, t, 3)
    torch.testing.assert_close(value, expected)
    leaves = [h, t, model.logit_scale, model.logit_bias, *model.pooling.parameters()]
    gradients = torch.autograd.grad(expected, leaves)
    for computed, gradient in zip(torch.autograd.grad(value, leaves), gradients, strict=True):
        torch.testing.assert_close(computed, gradient)


@pytest.mark.parametrize("accum", [1, 2])
def test_each_step_draws_other_texts(accum):
    config = Config(loss="flair_sampled", captions_per_image=3, global_loss_weight=0.5, device="cpu")
    model = make_model(config)
    task = ContrastiveTask(model, config, Processes(0, 1, torch.device("cpu"))).train()
    task.encode = partial(encode_double, model)
    values = set()
    torch.manual_seed(7)
    for _ in range(3):
        values.add(backward_step(task, cut(make_batch(3), accum), nullcontext, lambda x: x)[0].item())
    assert len(values) == 3
    torch.manual_seed(7)
    again = backward_step(task, cut(make_batch(3), accum), nullcontext, lambda x: x)[0].item()
    assert again in values


def loss_and_gradients(rank, count, accum, patch_dropout=0.0, **fields):
    """One backward pass of this process's share, through the DDP-wrapped task as the trainer does it."""
    config = Config(**fields)
    model = make_model(config, patch_dropout)
    processes = Processes(rank, count, torch.device("cpu"))
    task = ContrastiveTask(model, config, processes).train()
    task.encode = partial(encode_double, model)
    wrapped = DistributedDataParallel(task, gradient_as_bucket_view=True) if count > 1 else task
    torch.manual_seed(7)
    slices = cut(cut(make_batch(config.captions_per_image), count)[rank], accum)
    value, _ = backward_step(wrapped, slices, nullcontext, lambda x: x)
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    return processes.mean(value).item(), gradients


def dense(**fields):
    """The same in one process, all pairs at once, from the equations with the owner of each text written out."""
    config = Config(**fields)
    model = make_model(config).train()
    captions = config.captions_per_image
    images, tokens, mask = make_batch(captions)
    h, t = encode_double(model, images, tokens)
    kept = mask.flatten() if config.caption_fill == "mask" else torch.ones_like(mask.flatten())
    owner = torch.tensor([image for image in range(BATCH) for _ in range(captions)])[kept]
    own = owner == torch.arange(BATCH)[:, None]
    mean = model.pooling.out_proj(model.pooling.v_proj(h.mean(dim=1)))  # all tokens weigh the same
    features = mean / mean.norm(dim=-1, keepdim=True)
    scores = [torch.einsum("btd,td->bt", model.contextualize(h, t), t), features @ t.T]
    value = 0.0
    for weight, logits in zip((1 - config.global_loss_weight, config.global_loss_weight), scores, strict=True):
        logits = model.logit_scale.exp() * logits[:, kept]
        if config.loss == "sigmoid":
            y = torch.where(own, 1.0, -1.0)
            part = -F.logsigmoid(y * (logits + model.logit_bias)).sum() / len(owner)
        else:
            log_p = logits.log_softmax(dim=1)
            of_images = [
                -row[mine].logsumexp(0) if config.loss == "softmax_in" else -row[mine].mean()
                for row, mine in zip(log_p, own, strict=True)
            ]
            part = (F.cross_entropy(logits.T, owner) + torch.stack(of_images).mean()) / 2
        value = value + weight * part
    value.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    return value.item(), gradients


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert abs(found[1][name] - gradient).max() <= 1e-5 * abs(gradient).max(), name


@pytest.mark.parametrize("pooling", ["text", "first"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one_process(pool, loss, pooling, count):
    fields = {"loss": loss, "pooling": pooling}
    expected = loss_and_gradients(0, 1, 1, **fields)
    for found in pool.run(partial(loss_and_gradients, **fields), count, 1):
        assert_equal(found, expected)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_is_the_larger_batch(loss, accum):
    assert_equal(loss_and_gradients(0, 1, accum, loss=loss), loss_and_gradients(0, 1, 1, loss=loss))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_accumulation_under_ddp_is_the_larger_batch(pool, loss):
    expected = loss_and_gradients(0, 1, 1, loss=loss)
    for found in pool.run(partial(loss_and_gradients, loss=loss), 2, 2):
        assert_equal(found, expected)


SEVERAL = [
    {"loss": "sigmoid", "captions_per_image": 3},
    {"loss": "sigmoid", "captions_per_image": 3, "caption_fill": "mask", "global_loss_weight": 0.3},
    {"loss": "softmax", "captions_per_image": 3, "caption_fill": "mask"},
    {"loss": "softmax_in", "captions_per_image": 3, "caption_fill": "mask", "global_loss_weight": 1.0},
    {"loss": "sigmoid", "captions_per_image": 1, "caption_fill": "mask", "global_loss_weight": 0.5},
]


@pytest.mark.parametrize(
    ("count", "accum"),
    [(1, 1), (1, 2), (2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (4, 1)))],
)
def test_several_captions_are_the_equations(pool, count, accum):
    for fields in SEVERAL:
        expected = dense(**fields)
        for found in pool.run(partial(loss_and_gradients, **fields), count, accum):
            assert_equal(found, expected)


@pytest.mark.parametrize(("count", "accum"), [(1, 2), (2, 2)])
def test_flair_does_not_depend_on_how_the_batch_is_spread(pool, count, accum):
    fields = {"pooling": "flair", "pair_tokens": "patches", "captions_per_image": 3, "global_loss_weight": 0.5}
    expected = loss_and_gradients(0, 1, 1, **fields)
    for result in pool.run(partial(loss_and_gradients, **fields), count, accum):
        assert_equal(result, expected)


def test_accumulation_replays_patch_dropout():
    """The second pass over a slice drops the patches that the first one dropped: gradients match finite differences."""
    model = make_model(Config(), patch_dropout=0.5)
    task = ContrastiveTask(model, Config(), Processes(0, 1, torch.device("cpu"))).train()
    slices = cut(make_batch(), 2)

    def value():
        torch.manual_seed(7)
        model.zero_grad()
        return backward_step(task, slices, nullcontext, lambda x: x)[0].item()

    task.encode = partial(encode_double, model)
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
    return Features(model.encode_image(images.double() / 255), model.encode_text(tokens.flatten(0, 1)))
