"""SwiGLU, the norm of a sum, and q, k, v under Triton's interpreter, run by test_interpret.py."""

import dataclasses

import pytest
import torch
import triton.language as tl

from tests.kernels.interpreter import repair
from tests.ops.block_cases import (
    CASES,
    called,
    input_results,
    input_tensors,
    norm_results,
    plain_add_norm,
    plain_inputs,
    plain_swiglu,
)
from tests.ops.cases import poison_new_tensors
from tests.ops.definition import relative_error
from zoo.kernels import narrow, norm, pieces, qkv, swiglu
from zoo.ops import add_norm, attention_inputs, backend
from zoo.ops import swiglu as swiglu_op

repair()


def test_the_kernels_run_here():
    cpu = torch.device("cpu")
    assert backend.choose("swiglu", cpu, torch.float32, 0) is swiglu
    assert backend.choose("norm", cpu, torch.float32, 0) is norm
    assert backend.choose("qkv", cpu, torch.float32, 8) is qkv


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("width", [7, 1024, 1100])
def test_swiglu(width, dtype, bound, monkeypatch):
    """Rows that fill a part of a tile, one, and two; a strided projection and an expanded gradient."""
    torch.manual_seed(0)
    poison_new_tensors(monkeypatch)
    packed = (3 * torch.randn(3, 2 * width + 5)).to(dtype)[:, : 2 * width].requires_grad_()
    grad = torch.randn(3, 1).to(dtype).expand(3, width)
    ours = swiglu_op(packed)
    exact = packed.detach().double().requires_grad_()
    theirs = plain_swiglu(exact)
    assert relative_error(ours.detach(), theirs.detach()) <= bound
    found = torch.autograd.grad(ours, packed, grad)[0], torch.autograd.grad(theirs, exact, grad.double())[0]
    assert relative_error(*found) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 12), (70, 768), (3, 5000)], ids=str)
def test_the_norm_of_a_sum(shape, dtype, bound, monkeypatch):
    """Rows that fill runs and tiles in part; with and without a gradient of the sum; every element is written."""
    poison_new_tensors(monkeypatch)
    for used in (True, False):
        ours = norm_results(add_norm, shape, dtype, sum_used=used)
        exact = norm_results(plain_add_norm, shape, dtype, kind=torch.float64, sum_used=used)
        for one, truth in zip(ours, exact, strict=True):
            assert relative_error(one, truth) <= bound


def test_the_norm_of_stacked_replicas():
    torch.manual_seed(0)
    leaves = [torch.randn(3, *shape).requires_grad_() for shape in ((35, 12), (35, 12), (12,))]
    stacked = torch.vmap(add_norm)(*leaves)
    single = [torch.stack(x) for x in zip(*(plain_add_norm(*x) for x in zip(*leaves, strict=True)), strict=True)]
    gradients = [torch.autograd.grad(sum(x.pow(3).sum() for x in found), leaves) for found in (stacked, single)]
    for ours, theirs in ((stacked, single), gradients):
        for x, y in zip(ours, theirs, strict=True):
            assert relative_error(x.detach(), y.detach().double()) <= 2e-6


LARGE = dataclasses.replace(CASES[0], name="large", heads=12, kv_heads=12, dim=64, batch=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_qkv(case, dtype, monkeypatch):
    """Values and gradients against the steps one by one in float64; every element returned has been written. Runs are
    short: several to a row."""
    monkeypatch.setattr(qkv, "RUN", 8)
    tensors = input_tensors(case, dtype)
    poison_new_tensors(monkeypatch)
    results = [input_results(f, case, tensors, k) for f, k in ((attention_inputs, None), (plain_inputs, torch.float64))]
    for ours, theirs in zip(*results, strict=True):
        bound = 5e-6 if dtype == torch.float32 else 3e-3
        assert relative_error(ours, theirs) <= bound


def test_qkv_of_stacked_replicas():
    """Weights by stack: the rows of each replica take its own."""
    case = CASES[0]
    sets = [input_tensors(case, torch.float32, seed=seed) for seed in range(3)]
    leaves = {name: torch.stack([s[0][name].detach() for s in sets]).requires_grad_() for name in sets[0][0]}
    single = [{name: x[i] for name, x in leaves.items()} for i in range(3)]
    options = sets[0][1]
    stacked = torch.vmap(lambda leaves: called(attention_inputs, case, leaves, options))(leaves)
    one_by_one = zip(*(called(plain_inputs, case, x, options) for x in single), strict=True)
    results = []
    for found in (stacked, [torch.stack(x) for x in one_by_one]):
        gradients = torch.autograd.grad(sum(x.square().sum() for x in found), list(leaves.values()))
        results.append([*found, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours.detach(), theirs.detach().double()) <= 1e-5


@pytest.mark.parametrize("shape", [(5, 96, 6), (130, 100, 24), (64, 64, 48)], ids=str)
def test_narrow_products(shape, monkeypatch):
    """Rows, inner and outer width that fill their tiles in part: float32 from three products of pieces. In float16: the
    interpreter multiplies bfloat16 wrongly (zoo/ops/backend.py)."""
    monkeypatch.setattr(narrow, "PIECE", tl.float16)
    rows, inner, width = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(width, inner)
    found, exact = narrow.piecewise_product(x, weight), x.double() @ weight.double().T
    assert relative_error(found, exact) <= 2e-6
    assert relative_error(x.half().double() @ weight.half().double().T, exact) > 1e-4  # what the pieces are for


@pytest.mark.parametrize("shape", [(1, 3, 24), (2, 1100, 11), (3, 1, 1), (2, 5, 0)], ids=str)
def test_pieces_add_up(shape):
    torch.manual_seed(0)
    partial = torch.randn(shape)
    torch.testing.assert_close(pieces.add_up(partial), partial.double().sum(dim=1).float(), rtol=0, atol=3e-5)
