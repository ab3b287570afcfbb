"""What is trained, and how fast."""

import json

import pytest

from llip.configs import Config
from llip.open_clip.factory import create_model, model_spec
from llip.training.step.optimizer import create_optimizer, set_learning_rate
from tests.helpers import BACKBONE_MODEL


@pytest.fixture
def make(tiny_model):
    def build(**changes):
        config = Config(pool_heads=4, **{"model": tiny_model, "mixture_tokens": 4} | changes)
        return config, create_model(model_spec(config), None, config.model)

    return build


def rates(model, config):
    optimizer = create_optimizer(model, config)
    set_learning_rate(optimizer, 2.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_every_parameter_is_in_one_group_and_matrices_alone_decay(make):
    config, model = make(wd=0.3)
    groups = create_optimizer(model, config).param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    free = {names[p] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"logit_scale", "logit_bias", "visual.class_embedding", "visual.positional_embedding"} <= free
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" not in free
    assert "text.token_embedding.weight" in free


def test_layers_further_down_learn_slower(make):
    config, model = make(layer_decay=0.5)
    found = rates(model, config)
    assert found["visual.transformer.resblocks.1.mlp.c_fc.weight"] == 2.0
    assert found["visual.transformer.resblocks.0.mlp.c_fc.bias"] == 1.0
    assert (
        found["visual.conv1.weight"] == found["visual.positional_embedding"] == found["visual.class_embedding"] == 0.5
    )
    assert found["text.token_embedding.weight"] == found["text.positional_embedding"] == 0.5
    assert found["text.transformer.resblocks.0.ln_1.weight"] == 1.0
    assert found["visual.ln_post.weight"] == found["text.text_projection"] == found["logit_scale"] == 2.0
    assert all(rate == 2.0 for name, rate in found.items() if name.startswith("pooling."))
    assert set(rates(model, config.replace(layer_decay=1.0)).values()) == {2.0}


def test_a_backbone_learns_slower_block_by_block_and_its_head_does_not(make, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(BACKBONE_MODEL))
    config, model = make(model=str(tmp_path / "m.json"), layer_decay=0.5)
    found = rates(model, config)
    assert all(rate == 2.0 for name, rate in found.items() if name.startswith(("visual.head.", "visual.trunk.layer4.")))
    rest = [
        found[f"visual.trunk.{name}.weight"] for name in ("layer3.0.conv1", "layer2.0.bn1", "layer1.0.conv2", "bn1")
    ]
    assert rest == [1.0, 0.5, 0.25, 0.125]
    groups = create_optimizer(model, config).param_groups
    free = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    head = model.visual.head
    assert all(any(p is q for q in free) for p in (head.latents, head.positions, head.norm.weight))
