"""A needle 16 windows back and more: two layers of gatedfwa_nsa retrieve it, gatedfwa and swa of that size cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo import config
from zoo.backbone import Backbone, BackboneConfig
from zoo.mixers.base import Context

WINDOW, WIDTH, VALUES, NOISE = 4, 32, 4, 4
MARK = NOISE + VALUES
TOKENS = 24 * WINDOW
PLACES = TOKENS - 1 - 16 * WINDOW - WINDOW  # of the mark: from the second block on, 16 windows before the end at least


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise; somewhere in seven blocks a mark and a value; the mark again at the end, 16 to 22 windows later. The first
    block, the own and the previous one are always chosen, and one more by what is in it."""
    x = torch.randint(NOISE, (rows, TOKENS), generator=generator)
    value = torch.randint(VALUES, (rows,), generator=generator)
    row, at = torch.arange(rows), WINDOW + torch.randint(PLACES, (rows,), generator=generator)
    x[row, at], x[row, at + 1] = MARK, NOISE + value
    x[:, -1] = MARK
    return x, value


def backbone(mixer: str) -> Backbone:
    torch.manual_seed(0)
    fields = {"window": WINDOW, "token_shift": True}
    fields |= {"gate_bias": 4.0} if mixer != "swa" else {}
    fields |= {"block": 4, "top": 4} if mixer == "gatedfwa_nsa" else {}
    node = {"width": WIDTH, "depth": 2, "heads": 2, "kv_heads": 1, "mixer": {"name": mixer, **fields}}
    return Backbone(config.build(BackboneConfig, node))


def accuracy(mixer: str, steps: int) -> tuple[float, int]:
    """Of held-out needles, after at most so many steps; and the steps that it took to learn them."""
    model = backbone(mixer)
    embed, head = nn.Embedding(MARK + 1, WIDTH), nn.Linear(WIDTH, VALUES)
    parameters = [*model.parameters(), *embed.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    recent, step = 9.0, 0
    while step < steps and recent >= 0.05:
        x, value = batch(32, generator)
        loss = F.cross_entropy(head(model(embed(x), Context())[0][:, -1]), value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = 0.9 * recent + 0.1 * loss.item()
        if step % 50 == 0:
            print(mixer, step, round(recent, 3), flush=True)
        step += 1
    x, value = batch(512, generator)
    with torch.no_grad():
        found = head(model(embed(x), Context())[0][:, -1]).argmax(-1)
    return (found == value).float().mean().item(), step


@pytest.mark.slow
def test_needle_at_sixteen_windows():
    """The others get twice the steps that the sparse mixer needs."""
    learned, steps = accuracy("gatedfwa_nsa", 1500)
    others = {mixer: accuracy(mixer, 2 * steps) for mixer in ("gatedfwa", "swa")}
    print(learned, steps, others)
    assert learned > 0.95
    assert all(found < 0.5 and taken == 2 * steps for found, taken in others.values())  # chance is 0.25


@pytest.mark.parametrize("mixer", ["gatedfwa_nsa", "gatedfwa", "swa"])
def test_what_the_last_output_owes_to_the_needle(mixer):
    """However they are trained: nothing where the layers' windows don't reach that far. The gates' gradient is a sum
    over all later tokens of what there adds up to zero (zoo/ops/window.py): to zero but for the rounding of float64."""
    x, _ = batch(8, torch.Generator().manual_seed(1))
    embedded = nn.Embedding(MARK + 1, WIDTH)(x).detach().double().requires_grad_()
    others = embedded.detach().clone()
    others[:, WINDOW : WINDOW + PLACES + 1] = torch.randn_like(others[:, WINDOW : WINDOW + PLACES + 1])
    model = backbone(mixer).double()
    last, other = (model(h, Context())[0][:, -1] for h in (embedded, others))
    (grad,) = torch.autograd.grad(last, embedded, torch.randn_like(last))
    sizes = grad.abs().amax((0, 2))
    needle = float(sizes[WINDOW : WINDOW + PLACES + 1].max() / sizes.max())
    if mixer == "gatedfwa_nsa":
        assert needle > 1e-6
        assert not torch.equal(last, other)
    else:
        assert needle == 0 or (mixer == "gatedfwa" and needle < 1e-18)
        assert torch.equal(last, other)
