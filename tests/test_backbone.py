"""The stack around the mixers: patterns, positions, options, and errors that name the field."""

import pytest
import torch

from zoo import config
from zoo.backbone import Backbone, BackboneConfig, parse_pattern
from zoo.config import ConfigError
from zoo.mixers.base import Context
from zoo.registry import mixers


def build(**fields) -> BackboneConfig:
    return config.build(
        BackboneConfig, {"width": 32, "depth": 4, "heads": 2, "mixer": {"name": "gatedfwa", "window": 8}}, fields
    )


def test_pattern_is_tiled_over_depth():
    layers = build(
        pattern="gatedfwa*2, softmax", depth=5, other_mixers=[{"name": "softmax", "qk_norm": "none"}]
    ).layers()
    assert [layer.name for layer in layers] == ["gatedfwa", "gatedfwa", "softmax", "gatedfwa", "gatedfwa"]
    assert layers[0].config.window == 8
    assert layers[2].config.qk_norm == "none"


@pytest.mark.parametrize("pattern", ["gatedfw", "gatedfwa*0", "gatedfwa*x"])
def test_a_wrong_pattern_is_named(pattern):
    with pytest.raises(ValueError, match="gatedfwa"):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"heads": 3}, "width = 32 is not a multiple of heads = 3"),
        ({"heads": 4, "kv_heads": 3}, "heads = 4 is not a multiple of kv_heads = 3"),
        ({"positions": "learned"}, "max_len"),
        ({"positions": "rotery"}, "did you mean 'rotary'"),
        ({"drop_path": 1.0}, "drop_path = 1.0"),
        ({"depth": 0}, "depth = 0"),
        ({"mixer": {"window": 0}}, "window = 0"),
        ({"mixer": {"window": -5}}, "window = -5"),
        ({"mixer": {"windw": 5}}, "did you mean 'window'"),
    ],
)
def test_errors_name_the_field(fields, words):
    with pytest.raises(ConfigError) as error:
        build(**fields)
    assert words in str(error.value)


@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "none"])
def test_positions_and_mlp_can_be_left_out(positions, mlp):
    torch.manual_seed(0)
    backbone = Backbone(build(positions=positions, mlp=mlp, max_len=16)).eval()
    h = torch.randn(2, 16, 32)
    full, _ = backbone(h, Context())
    cache = backbone.init_cache(2, 16)
    steps = torch.cat([backbone(h[:, t : t + 1], Context(), cache)[0] for t in range(16)], dim=1)
    torch.testing.assert_close(steps, full, rtol=1e-4, atol=1e-5)
    if positions == "learned":
        with pytest.raises(ValueError, match="max_len = 16"):
            backbone(torch.randn(1, 17, 32), Context())


def test_steps_past_the_learned_positions_are_named():
    backbone = Backbone(build(positions="learned", max_len=8)).eval()
    cache = backbone.init_cache(1, 8)
    _, cache = backbone(torch.randn(1, 8, 32), Context(), cache)
    with pytest.raises(ValueError, match="9 tokens exceed max_len = 8"):
        backbone(torch.randn(1, 1, 32), Context(), cache)


def test_two_rotary_axes():
    torch.manual_seed(0)
    backbone = Backbone(build(head_dim=16))
    h = torch.randn(1, 12, 32)
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1).view(1, 12, 2)
    moved, _ = backbone(h, Context(positions=grid + 5))
    here, _ = backbone(h, Context(positions=grid))
    torch.testing.assert_close(moved, here, rtol=1e-3, atol=1e-4)  # rotary positions are relative on each axis
    swapped, _ = backbone(h, Context(positions=grid.flip(-1)))
    assert (swapped - here).abs().max() > 1e-3


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(build(checkpoint=on)).train()
        h = torch.randn(2, 20, 32, requires_grad=True)
        backbone(h, Context())[0].square().sum().backward()
        grads.append([h.grad, *(p.grad for p in backbone.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_dropout_and_drop_path_act_in_training_only():
    backbone = Backbone(build(dropout=0.3, drop_path=0.3))
    h = torch.randn(4, 10, 32)
    backbone.train()
    assert not torch.equal(backbone(h, Context())[0], backbone(h, Context())[0])
    backbone.eval()
    assert torch.equal(backbone(h, Context())[0], backbone(h, Context())[0])


def test_a_mixer_initialises_itself(monkeypatch):
    class Own(mixers.get("swa")):  # type: ignore[misc]
        def __init__(self, config, dims):
            super().__init__(config, dims)
            torch.nn.init.eye_(self.out.weight)

    monkeypatch.setattr(mixers, "_entries", {**mixers._entries, "own": Own})
    backbone = Backbone(build(mixer={"name": "own"}))
    for block in backbone.blocks:
        assert torch.equal(block.mixer.out.weight, torch.eye(32))


@pytest.mark.parametrize("name", mixers.names())
def test_init_std_is_the_spread_of_every_matrix(name):
    backbone = Backbone(build(mixer={"name": name}, init_std=0.5, width=64, positions="learned", max_len=50))
    spreads = {
        name: module.weight.std().item()
        for name, module in backbone.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    assert len(spreads) > 4
    for parameter, spread in spreads.items():
        assert spread == pytest.approx(0.5, rel=0.2), parameter


def test_flops_follow_the_window():
    narrow, wide = Backbone(build()), Backbone(build(mixer={"window": 64}))
    assert narrow.flops(64) < wide.flops(64)
    per_token = [narrow.flops(t) / t for t in (1000, 2000)]
    assert per_token[1] < 1.01 * per_token[0]


def test_every_parameter_gets_a_gradient():
    backbone = Backbone(build())
    backbone(torch.randn(2, 20, 32), Context())[0].square().sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_mlp_in_chunks_changes_nothing_but_memory(mlp):
    torch.manual_seed(0)
    whole = Backbone(BackboneConfig(width=16, heads=2, depth=2, mlp=mlp, checkpoint=True)).double()
    chunked = Backbone(BackboneConfig(width=16, heads=2, depth=2, mlp=mlp, checkpoint=True, mlp_chunk=3)).double()
    chunked.load_state_dict(whole.state_dict())
    h = torch.randn(2, 8, 16, dtype=torch.float64)
    outs = [model(h, Context())[0] for model in (whole, chunked)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    grads = [
        torch.autograd.grad(out.pow(3).sum(), list(model.parameters()))
        for out, model in zip(outs, (whole, chunked), strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="mlp_chunk = -1"):
        BackboneConfig(mlp_chunk=-1)


def test_an_identity_mlp_adds_the_normalised_stream():
    torch.manual_seed(0)
    backbone = Backbone(build(mlp="identity", depth=1)).double()
    block, h = backbone.blocks[0], torch.randn(2, 5, 32, dtype=torch.float64)
    mixed = h + block.mixer(block.mixer_norm(h), backbone._place(h, Context(), None))[0]
    torch.testing.assert_close(backbone(h, Context())[0], backbone.norm(mixed + block.mlp_norm(mixed)))
    assert backbone.flops(10) == block.mixer.flops(10)
