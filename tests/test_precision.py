"""Lower precision: autocast, caches of another dtype, and positions far out."""

import pytest
import torch
from torch.nn import functional as F

from zoo import config, ops
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context
from zoo.ops import rotary_table
from zoo.registry import mixers


def backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    known = mixers.get(name).Config.__dataclass_fields__
    node = {"name": name} | ({"window": 8} if "window" in known else {})
    return Backbone(config.build(BackboneConfig, {"width": 32, "depth": 2, "heads": 2, "mixer": node})).eval()


def steps(model: Backbone, h: torch.Tensor, cache_dtype: torch.dtype) -> torch.Tensor:
    cache = model.init_cache(h.shape[0], h.shape[1], dtype=cache_dtype)
    first, cache = model(h[:, :12], Context(), cache)
    return torch.cat([first, *(model(h[:, t : t + 1], Context(), cache)[0] for t in range(12, h.shape[1]))], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", mixers.names())
@pytest.mark.parametrize("kind", ["autocast", "bf16_model", "bf16_cache"])
def test_steps_follow_the_full_forward_in_low_precision(name, kind):
    model, h = backbone(name), torch.randn(2, 24, 32)
    expected, _ = model(h, Context())
    if kind == "bf16_model":
        model.bfloat16()
        h = h.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        got = steps(model, h, torch.bfloat16 if kind != "autocast" else torch.float32)
        full, _ = model(h, Context())
    scale = expected.std()
    assert (got.float() - full.float()).std() < 0.02 * scale
    assert (got.float() - expected).std() < 0.02 * scale


def test_autocast_does_not_reach_inside_the_ops():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 2, 16, requires_grad=True) for _ in range(3))
    decay = F.logsigmoid(torch.randn(2, 40, 2))
    results = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = ops.window_attention(q, k, v, decay, window=8)
            live = torch.full((2,), 40, dtype=torch.int32)
            ring = ops.ring_attention(q[:, -1:].detach(), k.detach(), v.detach(), decay, live)
        results.append((y, ring, *torch.autograd.grad(y.sum(), (q, k, v))))
    for without, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside, without, rtol=0, atol=0)


@pytest.mark.parametrize("position", [1_000_000, 2**24 + 1])
def test_rotary_angles_are_exact_far_out(position):
    cos, sin = rotary_table(torch.tensor([[position]]), 64, 10000.0)
    angle = position * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(cos[0, 0].double(), angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0, 0].double(), angle.sin(), rtol=0, atol=1e-6)


def test_training_in_bf16_makes_no_noise(tmp_path):
    from zoo.train import Recipe, train

    words = ["train.steps=2", "train.precision=bf16", "train.eval_every=0", "train.sample_every=0"]
    recipe = config.build(Recipe, *config.recipe_layers("text/smoke", words))
    assert train(recipe, tmp_path / "run").step == 2  # warnings are errors here
