"""The published layout as far as it is known, with PyTorch's own multi-head attention as the reference for its head."""

import pytest
import torch
from torch import nn

import llip
from llip.errors import UserError
from llip.open_clip.factory import ModelSpec, create_model
from llip.open_clip.pooling import unit_norm
from llip.open_clip.weights.load import load_weights
from tests.helpers import TINY_MODEL

HEADS, WIDTH, TOKENS = 4, TINY_MODEL["embed_dim"], 3


def tiny(tokens=TOKENS, pooling="text"):
    architecture = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.0}}
    return create_model(ModelSpec(architecture, tokens, pooling, HEADS, (WIDTH / HEADS) ** 0.5, "sigmoid"))


def attention(**options):
    """Return PyTorch's head with random weights and biases; its 1/sqrt(d) is the temperature of `tiny`."""
    torch.manual_seed(5)
    head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def published(head, tokens=TOKENS, one_position=False):
    """Return a file of the published layout: plain CLIP's names, `visual.class_embedding` [K, W], a head `pred.`."""
    torch.manual_seed(2)
    state = dict(tiny(tokens).state_dict())
    state = {key.removeprefix("text."): value for key, value in state.items() if not key.startswith("pooling.")}
    if one_position:
        position = state["visual.positional_embedding"]
        state["visual.positional_embedding"] = torch.cat([position[:1], position[tokens:]])
    state |= {f"pred.{key}": value for key, value in head.state_dict().items()}
    return {"epoch": 32, "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}


def reference(head, h, t):
    """Return z . t by PyTorch's head, of texts and token directions at norm sqrt(D) (`TextConditionedPooling`)."""
    scale = WIDTH**0.5
    columns = []
    for text in t:
        query = (scale * text).expand(len(h), 1, WIDTH)
        z, _ = head(query, scale * unit_norm(h), h)
        columns.append(unit_norm(z[:, 0]) @ text)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("options", [{"bias": True}, {"bias": False}, {"bias": True, "kdim": WIDTH, "vdim": WIDTH}])
def test_a_head_with_biases_scores_as_pytorchs(options):
    head, model = attention(**options), tiny()
    report = load_weights(model, published(head), towers_only=True)
    assert any("untested on the published files" in note for note in report.notes)
    torch.manual_seed(4)
    h, t = torch.randn(5, TOKENS, WIDTH), unit_norm(torch.randn(7, WIDTH))
    expected = reference(head, h, t).detach()
    torch.testing.assert_close(model.similarity(h, t).detach(), expected, atol=1e-4, rtol=0)
    dense = torch.einsum("btd,td->bt", model.contextualize(h, t), t).detach()
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=0)


def test_the_gradients_reach_the_query_bias_through_the_tiles():
    model = tiny()
    load_weights(model, published(attention()), towers_only=True)
    torch.manual_seed(4)
    h, t = torch.randn(40, TOKENS, WIDTH), unit_norm(torch.randn(50, WIDTH))
    weights = torch.randn(40, 50)
    gradients = []
    for scores in (model.similarity(h, t, 200_000), torch.einsum("btd,td->bt", model.contextualize(h, t), t)):
        model.zero_grad()
        (scores * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.pooling.parameters()])
    for tiled, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, dense, atol=2e-4, rtol=2e-4)


def test_the_biases_return_with_a_checkpoint(tmp_path):
    model = tiny().eval()
    load_weights(model, published(attention()), towers_only=True)
    torch.save({"model": model.config, "state_dict": model.state_dict()}, tmp_path / "c.pt")
    loaded = llip.load_pretrained(tmp_path / "c.pt")
    images, tokens = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a cat", "a dog"])
    torch.testing.assert_close(loaded(images, tokens), model(images, tokens))
    assert loaded.pooling.q_proj.bias.abs().max() > 0


def test_one_position_row_is_repeated():
    head, whole, one = attention(), tiny(), tiny()
    load_weights(whole, published(head), towers_only=True)
    load_weights(one, published(head, one_position=True), towers_only=True)
    rows = one.visual.positional_embedding
    assert torch.equal(rows[:TOKENS], whole.visual.positional_embedding[:1].expand(TOKENS, -1))
    assert torch.equal(rows[TOKENS:], whole.visual.positional_embedding[TOKENS:])
    assert one.visual.key_offset is None  # K tokens that were trained as K


def test_what_is_not_understood_is_listed_key_by_key():
    content = published(attention())
    for index in range(14):
        content["state_dict"][f"pred.unknown_{index}.weight"] = torch.zeros(2)
    with pytest.raises(UserError) as error:
        load_weights(tiny(), content, "llip_b16.pt", towers_only=True)
    assert all(f"unexpected pred.unknown_{index}.weight" in str(error.value) for index in range(14))
    model = tiny()
    report = load_weights(model, content, towers_only=True, strict=False)
    assert len(report.unexpected) == 14
    del content["state_dict"]["module._orig_mod.pred.out_proj.weight"]
    with pytest.raises(UserError, match=r"missing pooling\.out_proj\.weight"):
        load_weights(tiny(), content, towers_only=True)


def test_an_output_bias_out_of_reach_is_refused():
    head = attention()
    with torch.no_grad():
        head.out_proj.weight[0] = 0
        head.out_proj.bias.zero_()[0] = 1.0
    with pytest.raises(UserError, match=r"pred\.out_proj\.bias cannot be kept"):
        load_weights(tiny(), published(head), towers_only=True)


def test_other_rungs_take_the_towers_and_leave_the_head():
    model = tiny(pooling="mean")
    report = load_weights(model, published(attention()), towers_only=True)
    assert report.unexpected == ()
    assert not any(key.startswith("pooling.") for key in report.loaded)


def test_flairs_head_is_renamed():
    model = tiny(1, "flair")
    head = attention(add_zero_attn=True)
    state = published(head, 1)["state_dict"]
    parts = {key.removeprefix("pred."): value for key, value in head.state_dict().items()}
    state = {key: value for key, value in state.items() if "pred." not in key}
    state |= {f"visual_proj.attn.{key}": value for key, value in parts.items()}
    for norm in ("ln_q", "ln_k", "ln_v"):
        state |= {f"visual_proj.{norm}.weight": torch.rand(WIDTH), f"visual_proj.{norm}.bias": torch.rand(WIDTH)}
    report = load_weights(model, state, towers_only=True)
    assert "untested" in report.notes[0]
    assert torch.equal(model.pooling.attn.in_proj_weight, head.in_proj_weight)
    assert torch.equal(model.pooling.ln_v.bias, state["visual_proj.ln_v.bias"])
    of_llip = load_weights(tiny(1), state, towers_only=True)  # another rung takes the towers
    assert not any(name.startswith("pooling.") for name in of_llip.loaded)
