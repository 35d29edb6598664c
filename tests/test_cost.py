"""What linear-time promises: training cost grows with T, not T squared; decoding cost does not grow at all."""

import time
from collections.abc import Callable

import pytest
import torch

from zoo import config, state
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context


def backbone(mixer: str, **fields) -> Backbone:
    torch.manual_seed(0)
    node = {"name": mixer, **fields}
    return Backbone(config.build(BackboneConfig, {"width": 128, "depth": 2, "heads": 2, "mixer": node}))


def best_seconds(functions: dict[int, Callable[[], object]], repeats: int) -> dict[int, float]:
    """The fastest of `repeats` runs of each, taken in turn: other processes slow a run down, none speeds it up."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats + 1):
        for key, function in functions.items():
            began = time.perf_counter()
            function()
            best[key] = min(best[key], time.perf_counter() - began)
    return best


@pytest.mark.parametrize("mixer", ["swa", "gatedfwa"])
def test_training_step_is_linear_in_length(mixer):
    model = backbone(mixer, window=256)

    def step(h: torch.Tensor) -> None:
        model(h, Context())[0].square().mean().backward()

    inputs = {tokens: torch.randn(1, tokens, 128) for tokens in (2048, 8192)}
    seconds = best_seconds({tokens: lambda h=h: step(h) for tokens, h in inputs.items()}, 5)
    ratio = seconds[8192] / seconds[2048]
    print(f"{mixer}: {seconds} ratio {ratio:.2f}")
    assert ratio <= 4.6


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["swa", "gatedfwa"])
def test_decoding_is_flat_from_a_thousand_to_a_hundred_thousand_tokens(mixer):
    model = backbone(mixer, window=256).eval()
    cache = model.init_cache(1, 200_000)
    token = torch.randn(1, 1, 128)
    caches, seen = {}, 0
    for tokens in (1_000, 100_000):
        while seen < tokens:
            chunk = min(4096, tokens - seen)
            _, cache = model(torch.randn(1, chunk, 128), Context(), cache)
            seen += chunk
        caches[tokens] = state.clone(cache)
    held = {tokens: state.state_bytes(kept) for tokens, kept in caches.items()}
    seconds = best_seconds({n: lambda kept=kept: model(token, Context(), kept) for n, kept in caches.items()}, 100)
    print(f"{mixer}: {seconds} s a token, {held} bytes")
    assert held[1_000] == held[100_000]
    assert seconds[100_000] <= 1.3 * seconds[1_000]


@pytest.mark.parametrize("mixer", ["softmax", "fox"])
def test_full_attention_holds_every_token(mixer):
    model = backbone(mixer)
    held = {n: state.state_bytes(model.init_cache(1, n)["blocks"]) for n in (1_000, 100_000)}
    tails = state.state_bytes(model.init_cache(1, 0)["blocks"])
    assert held[100_000] - tails == 100 * (held[1_000] - tails)
