"""mlp_in_pieces against the MLP in one."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.block_cases import plain_swiglu
from tests.ops.definition import relative_error
from zoo.ops import mlp_in_pieces


def plain(x, up, down, gated):
    projected = F.linear(x, up)
    return F.linear(plain_swiglu(projected) if gated else F.gelu(projected), down)


def tensors(gated, dtype=torch.float64, stack=()):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 11, 6), (10 if gated else 5, 6), (6, 5))
    return [torch.randn(*stack, *size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [1, 4, 11, 100])
def test_pieces_are_the_whole(tokens, gated):
    leaves = tensors(gated)
    dy = torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for y in (mlp_in_pieces(*leaves, tokens=tokens, gated=gated), plain(*leaves, gated)):
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_weights_have_gradients_of_their_own_precision():
    leaves = tensors(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp_in_pieces(*leaves, tokens=4, gated=True)
    assert y.dtype == torch.bfloat16
    found = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = plain(*wide, True)
    exact = [exact, *torch.autograd.grad(exact, wide, torch.ones_like(exact))]
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours.detach(), theirs.detach()) <= 2e-2
    assert all(x.dtype == torch.float32 for x in found[1:])


def test_stacked_by_vmap():
    leaves = tensors(True, stack=(3,))
    stacked = torch.vmap(lambda *x: mlp_in_pieces(*x, tokens=4, gated=True))(*leaves)
    single = torch.stack([plain(*x, True) for x in zip(*leaves, strict=True)])
    torch.testing.assert_close(stacked, single)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (stacked, single)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiler_sees_no_pieces():
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for tokens in (5, 1):
        torch._dynamo.reset()
        torch.compile(lambda *x, n=tokens: mlp_in_pieces(*x, tokens=n, gated=True), backend=count)(*tensors(True))
    assert sizes[0] == sizes[1]


def test_it_keeps_its_promises_and_names_what_is_wrong():
    x, up, down = tensors(True, torch.float32)
    weights = [w.detach().unsqueeze(0) for w in (up, down)]
    arguments = (x, *weights, *(w.clone().requires_grad_() for w in weights), 4, True)
    torch.library.opcheck(torch.ops.zoo.mlp_in_pieces.default, arguments)
    with pytest.raises(ValueError, match="tokens = 0"):
        mlp_in_pieces(x, up, down, tokens=0, gated=True)
    with pytest.raises(ValueError, match=r"\(10, 6\)"):
        mlp_in_pieces(x, up, down, tokens=4, gated=False)
