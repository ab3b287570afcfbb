"""What is locked does not learn, keeps its statistics, and keeps no activations."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from llip.configs import Config
from llip.errors import UserError
from llip.open_clip.factory import create_model, model_spec
from llip.open_clip.towers.locks import blocks_above, lock_towers
from llip.training.checkpoints.run_folder import differences
from tests.helpers import BACKBONE_MODEL


@pytest.fixture
def make(tiny_model, tmp_path):
    def build(backbone=None, **changes):
        path = tiny_model
        if backbone:
            path = tmp_path / "backbone.json"
            vision = {"timm_model_name": backbone, "image_size": 64}
            path.write_text(json.dumps(BACKBONE_MODEL | {"vision_cfg": vision}))
        config = Config(model=str(path), pool_heads=4, **{"mixture_tokens": 4} | changes)
        torch.manual_seed(0)
        model = create_model(model_spec(config))
        lock_towers(model, config.lock_image, config.lock_text)
        return model

    return build


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("tokens", [1, 4])
def test_locked_towers_do_not_learn(make, tokens):
    names = trained(make(lock_image=True, lock_text=True, mixture_tokens=tokens))
    assert ("visual.class_embedding" in names) == (tokens > 1)
    assert {name.split(".")[0] for name in names} - {"visual"} == {"pooling", "logit_scale", "logit_bias"}
    assert {name for name in names if name.startswith("visual.")} <= {"visual.class_embedding"}


def test_nothing_to_train_is_a_mistake(make):
    model = make(mixture_tokens=1, pooling="first")
    model.logit_scale.requires_grad_(False)
    model.logit_bias.requires_grad_(False)
    with pytest.raises(UserError, match="leave nothing to train"):
        lock_towers(model, True, True)
    assert isinstance(model.logit_scale, torch.nn.Parameter)


def test_a_locked_backbone_keeps_weights_statistics_and_no_activations(make):
    model = make("resnet10t", lock_image="backbone", lock_text="encoder").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    images, tokens = torch.randn(4, 3, 64, 64), torch.randint(1, 100, (4, 12))
    for _ in range(3):
        model(images, tokens).square().sum().backward()
        optimizer.step()
        model.eval().train()  # as after an evaluation
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    fixed = {key for key in before if key.startswith(("visual.trunk.", "text."))} - {"text.text_projection"}
    assert same >= fixed
    assert any("running_var" in key for key in fixed)
    assert not same & {"visual.head.latents", "visual.head.proj_in.weight", "text.text_projection"}
    features = model.visual.frozen_features(images)
    assert bytes_kept(lambda: model.visual(images)) == bytes_kept(lambda: model.visual.from_features(features)) > 0


def bytes_kept(forward):
    sizes = []
    with saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        forward()
    return sum(sizes)


@pytest.mark.parametrize(
    ("backbone", "last", "below"),
    [
        ("resnet10t", "trunk.layer4.0.", "trunk.layer3.0."),
        ("tf_efficientnet_lite0", "trunk.blocks.6.0.", "trunk.blocks.5.3."),
        ("convnext_atto", "trunk.stages.3.blocks.1.", "trunk.stages.3.blocks.0."),
        (None, "transformer.resblocks.1.", "transformer.resblocks.0."),
    ],
)
def test_all_but_the_last_block_is_locked(make, backbone, last, below):
    model = make(backbone, lock_image=1)
    names = {name.removeprefix("visual.") for name in trained(model) if name.startswith("visual.")}
    everything = {name for name, _ in model.visual.named_parameters()}
    assert {name for name in everything if name.startswith(last)} <= names
    assert not {name for name in names if name.startswith(below)}
    expected = {name for name in everything if name.startswith(("head.", last, "ln_post", "proj"))}
    ours = {"class_embedding"} if backbone is None else set()
    after = {
        "trunk.conv_head.weight",
        "trunk.bn2.weight",
        "trunk.bn2.bias",
        "trunk.head.norm.weight",
        "trunk.head.norm.bias",
    }
    assert names == expected | ours | (everything & after)
    modes = {name: module.training for name, module in model.train().visual.named_modules()}
    assert modes[last.rstrip(".")]
    assert not modes[below.rstrip(".")]


def test_locks_that_a_model_does_not_have_are_mistakes(make):
    with pytest.raises(UserError, match=r"no mixture_head; set lock_image=true"):
        make(lock_image="backbone")
    with pytest.raises(UserError, match=r"lock_image = 3: the image tower has 2 blocks"):
        make(lock_image=3)


def test_true_and_one_are_other_locks():
    assert differences({"lock_image": True}, {"lock_image": 1}) == ["lock_image: True -> 1"]
    assert differences({"lock_image": True}, {"lock_image": True}) == []


def test_blocks_of_other_libraries_are_counted_by_their_names():
    names = [
        *("visual.trunk.blocks.0.attn.qkv.weight", "visual.trunk.blocks.2.norm1.weight", "visual.trunk.pos_embed"),
        *("text.transformer.encoder.layer.0.output.dense.weight", "text.transformer.encoder.layer.1.output.dense.bias"),
        *("text.transformer.embeddings.word_embeddings.weight", "text.proj.weight"),
    ]
    model = SimpleNamespace(visual=None, named_parameters=lambda: [(name, None) for name in names])
    assert list(blocks_above(model).values()) == [2, 0, 3, 1, 0, 2, 0]
    names[3:6] = [
        "text.transformer.block.0.layer.1.wi.weight",
        "text.transformer.block.1.layer.0.q.weight",
        "text.transformer.embed_tokens.weight",
    ]
    assert list(blocks_above(model).values()) == [2, 0, 3, 1, 0, 2, 0]
