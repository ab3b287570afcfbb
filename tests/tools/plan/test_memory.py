"""Memory by formula against what PyTorch keeps in a small run on the CPU, and parameters against OpenCLIP's own."""

import contextlib
import itertools

import open_clip
import pytest
import torch

from llip.config_search import search_config
from llip.configs import Config
from llip.open_clip.costs.flops import image_tower, text_tower
from llip.open_clip.factory import create_model, model_spec
from llip.tools.plan.memory import activations, block_bytes, gpu_memory, tower_widths
from llip.tools.plan.parameters import count_parameters
from llip.training.step.optimizer import create_optimizer

BATCH = 8
PARTITIONER = "aot_eager_decomp_partition"
"""Backend of torch.compile: what precedes Inductor's code generation."""


def config_of(tiny_model, **changes):
    return Config(model=tiny_model, mixture_tokens=5, pool_heads=2, batch_size=BATCH, **changes)


@pytest.mark.parametrize("name", ["tiny", "llip_quickstart", "llip_b16_k32", "llip_G14_k64"])
def test_parameters_are_open_clips_and_what_the_method_adds(name, tiny_model):
    config = config_of(tiny_model) if name == "tiny" else search_config(name)
    spec = model_spec(config)
    counted = count_parameters(spec)
    with torch.device("meta"):
        towers = open_clip.CustomTextCLIP(**spec.architecture)
    image, text = (sum(p.numel() for p in tower.parameters()) for tower in (towers.visual, towers.text))
    assert (counted.image_tower, counted.text_tower) == (image, text)
    assert counted.mixture_tokens == 2 * (config.mixture_tokens - 1) * image_tower(spec).width
    assert counted.pooling == 4 * spec.architecture["embed_dim"] ** 2
    assert counted.other == 2  # scale and bias


def test_parameters_of_a_real_model(tiny_model):
    for changes in ({}, {"pooling": "learned"}, {"pooling": "first", "loss": "softmax"}):
        spec = model_spec(config_of(tiny_model, **changes))
        assert count_parameters(spec).total == sum(p.numel() for p in create_model(spec).parameters())


def kept_by_autograd(model, encode):
    """Bytes of the storages that autograd keeps, apart from the model's own and from copies of its matrices."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.ndim == 2
    }
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage, tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encode()
    assert output.requires_grad
    return sum(storage.nbytes() for storage, shape in storages.values() if shape not in shapes)


@pytest.mark.parametrize(
    ("precision", "checkpointing", "quick_gelu", "compiled"),
    [
        *itertools.product(["fp32", "amp_bf16"], [False, True], [False, True], [False]),
        pytest.param("amp_bf16", False, True, True, marks=pytest.mark.slow),  # torch.compile takes 10 seconds
    ],
)
def test_activations_against_autograd(precision, checkpointing, quick_gelu, compiled):
    """Six blocks of 68 and of 32 tokens. Token ids and the like are left out of the formulas."""
    architecture = {
        "embed_dim": 64,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 64, "layers": 6, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 6},
    }
    changes = [f"precision={precision}", f"batch_size={BATCH}", f"torchcompile={str(compiled).lower()}"]
    config = search_config("llip_quickstart", changes)
    spec = model_spec(config)
    spec = type(spec)(architecture, 4, "text", 4, 5.0, "sigmoid")
    model = create_model(spec).train()
    model.set_grad_checkpointing(checkpointing)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "amp_bf16" else contextlib.nullcontext()
    encode_image, encode_text = model.encode_image, model.encode_text
    images, tokens = torch.randn(BATCH, 3, 64, 64), torch.randint(1, 1000, (BATCH, 32))
    with autocast:
        if compiled:  # the partitioner decides what is kept; no compiler is needed for that
            encode_image, encode_text = (torch.compile(f, backend=PARTITIONER) for f in (encode_image, encode_text))
            encode_image(images), encode_text(tokens)
        image = kept_by_autograd(model, lambda: encode_image(images))
        text = kept_by_autograd(model, lambda: encode_text(tokens))
    predicted = list(activations(config, spec, checkpointing, norm_is_half=precision == "amp_bf16"))
    if checkpointing:  # while a block is computed again, it is there in full: not during the forward pass
        for index, (tower, half) in enumerate(((image_tower(spec), True), (text_tower(spec), False))):
            widths = tower_widths(precision, half, norm_is_half=precision == "amp_bf16")
            predicted[index] -= BATCH * block_bytes(tower, widths, quick_gelu)
    stem = BATCH * 3 * 64 * 64 * (4 if precision == "fp32" else 2)
    assert predicted[0] + stem == pytest.approx(image, rel=0.02 if compiled else 0.01)
    assert predicted[1] == pytest.approx(text, rel=0.02)


def test_weights_gradients_and_optimizer_against_a_real_step(tiny_model):
    config = config_of(tiny_model)
    model = create_model(model_spec(config))
    optimizer = create_optimizer(model, config)
    scores = model(torch.randn(2, 3, 32, 32), torch.ones(2, 12).long())
    (scores * model.logit_scale + model.logit_bias).sum().backward()
    optimizer.step()
    planned = gpu_memory(config)
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert planned.optimizer == moments


def test_parts_follow_the_fields(tiny_model):
    config = config_of(tiny_model, precision="amp_bf16")
    plain = gpu_memory(config)
    twice = gpu_memory(config.replace(batch_size=2 * BATCH))
    assert twice.image_activations == 2 * plain.image_activations
    assert twice.weights == plain.weights
    assert gpu_memory(config.replace(grad_checkpointing=True)) == gpu_memory(config, checkpointing=True)
    assert gpu_memory(config, checkpointing=True).image_activations < plain.image_activations
    assert gpu_memory(config.replace(precision="fp32")).half_weights == 0
    assert gpu_memory(config.replace(pooling="mean")).score_tiles == 0
    several = gpu_memory(config.replace(captions_per_image=3, global_loss_weight=0.5))
    assert several.text_activations == 3 * plain.text_activations
    assert several.image_activations == plain.image_activations
    assert several.scores == 4 * (4 + 2) * 3 * BATCH**2  # two matrices with gradients, and the loss's temporaries
    b16 = search_config("llip_b16_k32")
    assert gpu_memory(b16.replace(score_memory=0.5)).score_tiles < gpu_memory(b16).score_tiles
    slices = gpu_memory(b16.replace(batch_size=64, accum_freq=4))
    assert slices.image_activations == gpu_memory(b16).image_activations // 4
    assert slices.total < gpu_memory(b16).total


def test_shares_averages_and_locked_towers(tiny_model):
    config = config_of(tiny_model, ngpus=4)
    counted = count_parameters(model_spec(config))
    towers, head = counted.image_tower + counted.mixture_tokens + counted.text_tower, counted.pooling + counted.other
    whole, shared = gpu_memory(config), gpu_memory(config.replace(distributed_engine="fsdp"))
    assert whole.weights == 4 * counted.total
    assert shared.weights == shared.gradients == 4 * (-(-towers // 4) + head)
    assert shared.optimizer == 2 * shared.gradients
    assert gpu_memory(config.replace(ema_decay=0.99)).weights == 2 * whole.weights
    locked = gpu_memory(config.replace(lock_text=True))
    assert locked.weights == whole.weights
    assert locked.gradients == whole.gradients - 4 * counted.text_tower
