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


def cost_ratio(short: Callable[[], object], long: Callable[[], object], limit: float, repeats: int) -> float:
    """Processor time of `long` over that of `short`, each the least of at most `repeats` runs taken in turn: other
    processes make a run wait, which does not count, or slow it down; none speeds it up. Stops early once two runs of
    each show a ratio within `limit`."""
    best = [float("inf"), float("inf")]
    for round_ in range(repeats):
        for i, function in enumerate((short, long)):
            began = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - began)
        if round_ and best[1] <= limit * best[0]:
            break
    print(f"{best[0]:.4f} s, {best[1]:.4f} s: ratio {best[1] / best[0]:.2f}")
    return best[1] / best[0]


@pytest.mark.parametrize("mixer", ["swa", "gatedfwa"])
def test_training_step_is_linear_in_length(mixer):
    model = backbone(mixer, window=256)

    def step(h: torch.Tensor) -> None:
        model(h, Context())[0].square().mean().backward()

    short, long = torch.randn(1, 2048, 128), torch.randn(1, 8192, 128)
    assert cost_ratio(lambda: step(short), lambda: step(long), limit=4.6, repeats=20) <= 4.6


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
    assert held[1_000] == held[100_000]

    def step(tokens: int) -> None:
        model(token, Context(), caches[tokens])

    assert cost_ratio(lambda: step(1_000), lambda: step(100_000), limit=1.2, repeats=300) <= 1.2


@pytest.mark.parametrize("mixer", ["softmax", "fox"])
def test_full_attention_holds_every_token(mixer):
    model = backbone(mixer)
    held = {n: state.state_bytes(model.init_cache(1, n)["blocks"]) for n in (1_000, 100_000)}
    tails = state.state_bytes(model.init_cache(1, 0)["blocks"])
    assert held[100_000] - tails == 100 * (held[1_000] - tails)
