"""A needle 16 windows back: two layers of gatedfwa_nsa retrieve it, gatedfwa and swa of that size cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo import config
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context

WINDOW, WIDTH, VALUES, NOISE = 4, 32, 4, 4
MARK = NOISE + VALUES
TOKENS = 17 * WINDOW + 4


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise; in the second or third block a mark and a value; the mark again at the end, 16 windows later."""
    x = torch.randint(NOISE, (rows, TOKENS), generator=generator)
    value = torch.randint(VALUES, (rows,), generator=generator)
    row, at = torch.arange(rows), 4 + torch.randint(3, (rows,), generator=generator)
    x[row, at], x[row, at + 1] = MARK, NOISE + value
    x[:, -1] = MARK
    return x, value


def accuracy(mixer: str, steps: int) -> float:
    torch.manual_seed(0)
    fields = {"window": WINDOW, "token_shift": True}
    fields |= {"gate_bias": 4.0} if mixer != "swa" else {}
    fields |= {"block": 4, "top": 4} if mixer == "gatedfwa_nsa" else {}
    node = {"width": WIDTH, "depth": 2, "heads": 2, "kv_heads": 1, "mixer": {"name": mixer, **fields}}
    backbone = Backbone(config.build(BackboneConfig, node))
    embed, head = nn.Embedding(MARK + 1, WIDTH), nn.Linear(WIDTH, VALUES)
    parameters = [*backbone.parameters(), *embed.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    recent = 9.0
    for step in range(steps):
        x, value = batch(32, generator)
        loss = F.cross_entropy(head(backbone(embed(x), Context())[0][:, -1]), value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = 0.9 * recent + 0.1 * loss.item()
        if step % 50 == 0:
            print(mixer, step, round(recent, 3), flush=True)
        if recent < 0.05:
            break
    x, value = batch(512, generator)
    with torch.no_grad():
        found = head(backbone(embed(x), Context())[0][:, -1]).argmax(-1)
    return (found == value).float().mean().item()


@pytest.mark.slow
def test_needle_at_sixteen_windows():
    found = {
        mixer: accuracy(mixer, steps) for mixer, steps in (("gatedfwa_nsa", 1500), ("gatedfwa", 150), ("swa", 150))
    }
    print(found)
    assert found["gatedfwa_nsa"] > 0.95, found
    assert max(found["gatedfwa"], found["swa"]) < 0.5, found  # chance is 0.25
