"""Linear + cross-entropy without standing logits: value and gradients against plain torch, and compiled."""

import pytest
import torch
import torch.nn.functional as F

from zoo import ops
from zoo.ops import loss


@pytest.mark.parametrize("chunk", [1 << 24, 64])
def test_value_and_gradients(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 30, (2, 13))
    targets[0, 3:6] = -100
    loss_sum, count = ops.linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == 23
    torch.testing.assert_close(loss_sum, expected, rtol=1e-12, atol=0)
    got = torch.autograd.grad(3 * loss_sum, (hidden, weight))
    for ours, theirs in zip(got, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nothing_scored():
    hidden = torch.randn(3, 8, requires_grad=True)
    loss_sum, count = ops.linear_cross_entropy(hidden, torch.randn(5, 8), torch.full((3,), -100))
    assert (loss_sum.item(), count.item()) == (0, 0)
    (grad,) = torch.autograd.grad(loss_sum, hidden)
    assert grad.abs().sum() == 0


def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    weight = torch.randn(30, 8, requires_grad=True)
    for tokens in (4, 9):
        hidden, targets = torch.randn(tokens, 8, requires_grad=True), torch.randint(0, 30, (tokens,))
        ours, _ = compiled(hidden, weight, targets)
        theirs, _ = ops.linear_cross_entropy(hidden, weight, targets)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (ours, theirs)))


def test_autocast_enters_low_and_sums_wide():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum, _ = ops.linear_cross_entropy(hidden, weight, torch.randint(0, 30, (6,)))
    assert loss_sum.dtype == torch.float32
    assert torch.autograd.grad(loss_sum, weight)[0].dtype == torch.float32


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        ops.linear_cross_entropy(torch.randn(4, 8), torch.randn(5, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="bfloat16"):
        ops.linear_cross_entropy(torch.randn(4, 8), torch.randn(5, 8).bfloat16(), torch.zeros(4, dtype=torch.int64))
