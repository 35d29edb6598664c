"""The gate: log_decay against loops, and the gate gradient's invariants."""

import pytest
import torch

from tests.ops.definition import log_decay_loops, relative_error
from zoo.ops import gated_window_attention, log_decay, reference, window_attention


def pre_activations(spread, dtype=torch.float64):
    torch.manual_seed(0)
    z, u = spread * torch.randn(2, 2, 9, 3, dtype=dtype)
    return z, u


@pytest.mark.parametrize("spread", [0.1, 1, 10])
def test_equals_the_loops(spread):
    z, u = (x.requires_grad_() for x in pre_activations(spread))
    weight = torch.randn(z.shape, dtype=z.dtype)
    actual, expected = log_decay(z, u), log_decay_loops(z, u)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), (z, u)), torch.autograd.grad((expected * weight).sum(), (z, u))
    )


@pytest.mark.parametrize("spread", [0.1, 1, 10])
def test_closed_form_gradient_equals_autograd(spread):
    z, u = (x.requires_grad_() for x in pre_activations(spread))
    weight = torch.randn(z.shape, dtype=z.dtype)
    expected = torch.autograd.grad((log_decay(z, u) * weight).sum(), (z, u))
    torch.testing.assert_close(reference.activate_backward(weight, z.detach(), u.detach()), expected)


def test_limits():
    zero = torch.zeros(1, 1, 1)
    assert log_decay(zero, zero).item() == pytest.approx(-0.6931472 / 1.001)
    assert log_decay(zero + 2, zero).item() == pytest.approx(-0.126928 / 1.001, rel=1e-5)
    assert log_decay(zero, zero - 100).item() == pytest.approx(-693.147, rel=1e-5)  # beta -> 0: a hard reset
    assert log_decay(zero + 50, zero + 100).item() == 0  # remembers everything
    assert log_decay(zero - 50, zero + 100).item() == pytest.approx(-50, rel=1e-4)  # relu(-z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_float32_and_never_positive(dtype):
    z, u = pre_activations(10, dtype)
    decay = log_decay(z, u)
    assert decay.dtype == torch.float32
    assert bool((decay <= 0).all())
    assert relative_error(decay, log_decay(z.double(), u.double())) < 1e-6


@pytest.mark.parametrize(("z", "u"), [((2, 3), (2, 4)), ((1, 3), (2, 3))])
def test_shapes_must_agree(z, u):
    with pytest.raises(ValueError, match="both must be"):
        log_decay(torch.zeros(z), torch.zeros(u))


def test_dtypes_and_eps():
    with pytest.raises(ValueError, match="one float dtype"):
        log_decay(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="eps is 0"):
        log_decay(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), eps=0)


@pytest.mark.parametrize("window", [5, None])
def test_prefix_gradient_sums_to_zero(window):
    """dU sums to zero over the sequence, and the first token's log-decay has no effect (SPEC.md 2.3)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 30, 2, 4, dtype=torch.float64)
    prefix = (-torch.rand(2, 30, 2, dtype=torch.float64)).cumsum(1).requires_grad_()
    decay = prefix.diff(dim=1, prepend=torch.zeros(2, 1, 2, dtype=torch.float64))
    decay.retain_grad()
    window_attention(q, k, v, decay, window=window).square().sum().backward()
    assert prefix.grad is not None
    assert decay.grad is not None
    assert prefix.grad.sum(1).abs().max() < 1e-12
    assert decay.grad[:, 0].abs().max() < 1e-12


def test_hard_resets_hide_what_came_before():
    """alpha = 693 per token (beta -> 0) in the middle: finite, and nothing older is seen."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 1, 8)
    z, u = torch.zeros(1, 40, 1), torch.full((1, 40, 1), 20.0)
    z += 20
    z[:, 17], u[:, 17] = 0, -50
    out = gated_window_attention(q, k, v, z, u, window=16)
    fresh = gated_window_attention(*(x[:, 17:] for x in (q, k, v, z, u)), window=16)
    torch.testing.assert_close(out[:, 17:], fresh)


def test_bias_precision_at_a_million_tokens():
    """A scaled stand-in: the last tokens of 1M at 0.69 nats each, where a global float32 prefix is 0.06 nats off."""
    torch.manual_seed(0)
    length, heads, window, last = 1_000_000, 1, 512, 64
    decay = -0.69 - 0.01 * torch.rand(1, length, heads)
    queries, keys = torch.zeros(1, last, heads, 1), torch.zeros(1, length, heads, 1)
    # With q = 0 the lse of window w is log sum_j exp(B_tj): its differences are the biases themselves.
    _, lse = window_attention(queries, keys, keys, decay, window=window, return_lse=True)
    tail = decay[0, -(window + last) :, 0].double()
    prefix = tail.cumsum(0)
    expected = torch.stack(
        [(prefix[t] - prefix[t - window + 1 : t + 1]).logsumexp(0) for t in range(window, window + last)]
    )
    assert (lse[0, :, 0] - expected).abs().max() <= 1e-5
    # The bias of the oldest visible key: v is 1 there and 0 elsewhere, so out = exp(B - lse).
    mild = decay / 100
    marked = keys.clone()
    marked[0, length - window] = 1
    out, lse = window_attention(queries[:, -1:], keys, marked, mild, window=window, return_lse=True)
    bias = out.double().log() + lse.double()[..., None]
    assert abs(float(bias) - float(mild[0, length - window + 1 :].double().sum())) <= 1e-4


@pytest.mark.parametrize("length", [500, 8000])
def test_gate_gradient_error_does_not_grow_with_the_length(length):
    """bfloat16 rounds out, so the rows of dS don't quite sum to zero: that must not add up along the sequence."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, length, 1, 32).bfloat16()
    decay = -0.5 * torch.rand(1, length, 1)
    errors = []
    for dtype in (torch.bfloat16, torch.float64):
        gate = decay.to(reference.accumulator(dtype)).requires_grad_()
        out = window_attention(*(x.to(dtype) for x in (q, k, v)), gate, window=64)
        errors.append(torch.autograd.grad(out, gate, dout.to(dtype))[0].double())
    assert (errors[0] - errors[1]).square().mean().sqrt() <= 0.01 * errors[1].square().mean().sqrt()
