"""precise_linear against float64, in pieces and whole, and wide_linear."""

import pytest
import torch

from tests.ops.definition import relative_error
from zoo.ops import linear, precise_linear, wide_linear


@pytest.fixture
def pieces(monkeypatch):
    """The path of a GPU under autocast, on the CPU."""
    monkeypatch.setattr(linear, "in_pieces", lambda x: True)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 37, 96, generator=generator).to(dtype).requires_grad_()
    weight, bias = (0.1 * torch.randn(size, generator=generator) for size in ((6, 96), (6,)))
    return x, weight.requires_grad_(), bias.requires_grad_()


def truth(x, weight, bias):
    return x.double() @ weight.double().T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_pieces_are_float32(pieces, dtype):
    x, weight, bias = tensors(dtype)
    y = precise_linear(x, weight, bias)
    assert y.dtype == torch.float32
    assert relative_error(y.detach(), truth(x, weight, bias).detach()) <= 1e-5
    rounded = truth(x.bfloat16(), weight.bfloat16(), bias).detach()
    assert relative_error(rounded, truth(x, weight, bias).detach()) > 1e-4  # what the pieces are for


def test_gradients_have_the_precision_of_autocast(pieces):
    inputs = tensors()
    dy = torch.randn(2, 37, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(precise_linear(*inputs), inputs, dy)
    expected = torch.autograd.grad(truth(*inputs), inputs, dy.double())
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other.double()) <= 1e-2


def test_the_gradient_of_half_an_error_is_that_of_the_whole(pieces):
    """The pieces stand for one x: a gradient that flowed through both would be twice as large, or none."""
    x, weight, bias = tensors()
    (found,) = torch.autograd.grad(precise_linear(x, weight, bias).sum(), x)
    assert relative_error(found, weight.detach().double().sum(0).expand_as(found)) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_cpu_computes_in_float32_at_least(dtype):
    x, weight, bias = tensors(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = precise_linear(x, weight, bias)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(y.detach(), truth(x, weight, bias).detach()) <= 1e-6


def test_stacked_by_vmap(pieces):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, *size, generator=generator).requires_grad_() for size in ((2, 5, 8), (4, 8)))
    stacked = torch.vmap(precise_linear)(x, weight)
    one_by_one = torch.stack([precise_linear(*pair) for pair in zip(x, weight, strict=True)])
    torch.testing.assert_close(stacked, one_by_one)
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (stacked, one_by_one)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_it_is_as_precise(pieces):
    """A compiler may compute x - bfloat16(x) as 0 when it sees both."""
    x, weight, bias = tensors()
    torch._dynamo.reset()
    y = torch.compile(lambda x, weight, bias: precise_linear(2 * x, weight, bias), fullgraph=True)(x, weight, bias)
    assert relative_error(y.detach(), truth(2 * x, weight, bias).detach()) <= 1e-5


def test_operator_keeps_its_promises(pieces):
    x, weight = torch.randn(5, 8), torch.randn(3, 8, requires_grad=True)
    for whole in (x, None):
        torch.library.opcheck(torch.ops.zoo.piecewise_linear.default, (x.bfloat16().requires_grad_(), whole, weight))


def test_autocast_is_asked_before_it_is_switched_off(monkeypatch):
    """float32 activations under autocast take the pieces, eager and compiled."""
    taken = []
    monkeypatch.setattr(linear, "in_pieces", lambda x: torch.is_autocast_enabled("cpu"))
    operator = linear._piecewise_linear
    monkeypatch.setattr(linear, "_piecewise_linear", lambda *x: taken.append(1) or operator(*x))
    x, weight, bias = tensors()
    precise_linear(x, weight, bias)
    assert not taken
    with torch.autocast("cpu", torch.bfloat16):
        precise_linear(x, weight, bias)
    assert taken


# ---------------------------------------------------------------------------------------------------------- wide_linear


def test_a_weights_gradient_is_not_rounded_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 37, n, generator=generator).bfloat16().float() for n in (24, 6))
    weight = torch.randn(6, 24, generator=generator).bfloat16().float()
    leaves = [y.requires_grad_() for y in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        y = wide_linear(*leaves)
    assert y.dtype == torch.bfloat16
    dx, dweight = torch.autograd.grad(y, leaves, dy.bfloat16())
    exact = [a.double() for a in (x @ weight.T, dy @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1))]
    for found, truth, bound in zip((y, dx, dweight), exact, (2**-8, 2**-8, 1e-6), strict=True):
        assert relative_error(found.detach(), truth.detach()) <= bound
    assert dweight.dtype == torch.float32
    rounded = torch.autograd.grad(torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()), weight, dy.bfloat16())
    assert relative_error(rounded[0], exact[2].detach()) > 1e-4  # what it is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_autocast_it_is_an_ordinary_layer(dtype):
    x, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 5, 8), (4, 8)))
    results = []
    for function in (wide_linear, torch.nn.functional.linear):
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wide_layers_stacked_by_vmap():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, *size, generator=generator).requires_grad_() for size in ((2, 5, 8), (4, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        stacked = torch.vmap(wide_linear)(x, weight)
        one_by_one = torch.stack([wide_linear(*pair) for pair in zip(x, weight, strict=True)])
    torch.testing.assert_close(stacked, one_by_one, rtol=1e-2, atol=1e-2)
    gradients = [torch.autograd.grad(y.float().square().sum(), (x, weight)) for y in (stacked, one_by_one)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-2)


def test_wide_linear_keeps_its_promises():
    x, weight = torch.randn(2, 5, 8).bfloat16().requires_grad_(), torch.randn(1, 3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.zoo.wide_linear.default, (x, weight.detach().bfloat16(), weight))
