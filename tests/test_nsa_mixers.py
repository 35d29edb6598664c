"""The sparse mixers beyond what every mixer is tested for: the paper's form, hybrids, costs counted by brute force."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.test_mixers import random_splits, run_chunks
from zoo import config, state
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers import nsa_blocks
from zoo.mixers.base import Context
from zoo.registry import mixers

FORMS = {
    "printed": {"block": 8, "compressed_block": 4, "stride": 2, "importance": "printed"},
    "paper": {"block": 8, "compressed_block": 4, "stride": 2, "compression": "mlp", "separate_kv": True},
    "overlap": {"block": 4, "compressed_block": 4, "stride": 2},
    "separate": {"block": 3, "separate_kv": True},
    "mlp": {"block": 3, "compression": "mlp"},
}


def backbone(name: str = "gatedfwa_nsa", pattern: str = "", **fields) -> Backbone:
    torch.manual_seed(0)
    mixer = {"name": name, "top": 4, "window": 6, **fields}
    node = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mixer": mixer, "pattern": pattern}
    model = Backbone(config.build(BackboneConfig, node)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 7, 90])
def test_full_equals_chunks_equals_steps(form, tokens):
    model = backbone(**FORMS[form])
    h = torch.randn(2, tokens, 32, dtype=torch.float64)
    full, _ = model(h, Context())
    for sizes in (random_splits(tokens, 1), [tokens], [1] * tokens):
        torch.testing.assert_close(run_chunks(model, h, sizes), full, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_packed_equals_separate(form):
    model = backbone(**FORMS[form])
    sizes = [5, 0, 1, 50, 33]
    h = torch.randn(1, sum(sizes), 32, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    packed, _ = model(h, Context(cu_seqlens=cu_seqlens))
    separate = torch.cat([model(part, Context())[0] for part in h.split(sizes, dim=1) if part.shape[1]], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_ragged_rows_and_state_bytes(form):
    model = backbone(**FORMS[form])
    lengths = torch.tensor([3, 40, 11])
    h = torch.randn(3, 44, 32, dtype=torch.float64)
    cache = model.init_cache(3, 44, dtype=h.dtype)
    for begin in range(0, 40, 16):
        here = (lengths - begin).clamp(0, 16)
        y, cache = model(h[:, begin : begin + 16], Context(lengths=here), cache)
        for row, length in enumerate(here):
            alone, _ = model(h[row : row + 1, : begin + length], Context())
            torch.testing.assert_close(y[row : row + 1, :length], alone[:, begin:], rtol=1e-9, atol=1e-9)
    for step in range(4):
        token = h[torch.arange(3), lengths + step].unsqueeze(1)
        y, cache = model(token, Context(), cache)
        for row, length in enumerate(lengths):
            alone, _ = model(h[row : row + 1, : length + step + 1], Context())
            torch.testing.assert_close(y[row], alone[0, -1:], rtol=1e-9, atol=1e-9)
    mixer = model.blocks[0].mixer
    for tokens in (2, 6, 40):
        held = state.state_bytes(mixer.init_state(1, tokens, device="cpu", dtype=torch.bfloat16))
        assert held == mixer.state_bytes(tokens, element_size=2)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form):
    model = backbone(**FORMS[form])
    model(torch.randn(1, 60, 32, dtype=torch.float64), Context())[0].square().sum().backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert not still


@torch.no_grad()
def test_hybrid_through_the_pattern():
    model = backbone(pattern="gatedfwa_nsa, swa", block=3)
    h = torch.randn(2, 30, 32, dtype=torch.float64)
    full, _ = model(h, Context())
    torch.testing.assert_close(run_chunks(model, h, [7, 1, 1, 21]), full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 12, 13, 47])
def test_pairs_are_counted_exactly(tokens):
    for block, top in ((4, 3), (5, 4)):
        seen = sum(
            t + 1 if t // block < top else (top - 1) * block + t % block + 1
            for t in range(tokens)
        )  # fmt: skip
        assert nsa_blocks.selected_pairs(tokens, block, top) == seen
    for block, stride in ((4, 4), (4, 2), (6, 3), (5, 1)):
        seen = sum(1 for t in range(tokens) for c in range(tokens) if c * stride + block <= t + 1)
        assert nsa_blocks.compressed_pairs(tokens, block, stride) == seen


def test_default_form_and_gates():
    model = Backbone(config.build(BackboneConfig, {"width": 64, "heads": 4, "kv_heads": 1, "mixer": {"name": "nsa"}}))
    mixer = model.blocks[0].mixer
    assert (mixer.config.block, mixer.config.top, mixer.config.window) == (64, 16, 512)
    assert (mixer.branch_gates.bias == 0).all()
    assert mixer.branch_gates.weight.shape == (12, 64)


@pytest.mark.parametrize("fields", [{"top": 2}, {"window": 0}, {"compressed_block": 128}, {"stride": 5}])
def test_wrong_configs(fields):
    with pytest.raises(ValueError, match="top|window|block"):
        mixers.get("nsa").Config(**fields)


READERS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


@torch.no_grad()
def step_bytes(mixer: dict[str, object], tokens: int) -> int:
    """What a decoding step after so many tokens allocates, all temporaries counted, and what its products and attention
    read, as float32."""
    node = {"width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mixer": mixer}
    model = Backbone(config.build(BackboneConfig, node)).eval()
    cache = model.init_cache(1, tokens + 2)
    for chunk in torch.randn(1, tokens + 1, 32).split([tokens, 1], 1):
        _, cache = model(chunk, Context(), cache)
    seen = {"profile_memory": True, "record_shapes": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **seen) as profiled:
        model(torch.randn(1, 1, 32), Context(), cache)
    events = profiled.events() or []
    read = [event for event in events if event.name in READERS]
    assert read
    return sum(max(0, event.self_cpu_memory_usage) for event in events if event.name != "[memory]") + sum(
        4 * math.prod(shape) for event in read for shape in event.input_shapes if shape
    )


def test_a_step_grows_with_the_blocks_not_with_the_tokens():
    """O(T / block + top * block + window): a compressed key and value of 16 numbers, and a few more, for each block.
    Full attention shows what would be seen of a step that touched every token."""
    sparse = {"name": "gatedfwa_nsa", "window": 16, "block": 16, "top": 4, "token_shift": True}
    grown, full = (step_bytes(mixer, 4096) - step_bytes(mixer, 1024) for mixer in (sparse, {"name": "softmax"}))
    blocks = (4096 - 1024) // 16
    assert 0 < grown <= (120 + 2 * 64) * blocks  # made, and the key and the value read
    assert full > 100 * 16 * blocks
