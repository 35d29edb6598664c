"""What stands between a block's products, as operators: SwiGLU's product, the norm of a sum, and q, k and v made ready
for attention.

The reference path here; the kernels in tests/kernels/interpreted_block.py and tests/ops/test_block_gpu.py.
"""

import pytest
import torch

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
from tests.ops.definition import relative_error
from zoo.ops import add_norm, attention_inputs, linear, swiglu


def test_swiglu_is_what_it_says():
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 14, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 7, dtype=torch.float64)
    ours, theirs = swiglu(packed), plain_swiglu(packed)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    found = [torch.autograd.grad(y, packed, grad)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sum_used", [True, False])
def test_the_norm_of_a_sum_is_what_it_says(sum_used):
    ours, theirs = (norm_results(f, (2, 5, 14), torch.float64, sum_used=sum_used) for f in (add_norm, plain_add_norm))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_norm_of_no_rows_and_a_sum_alone():
    nothing = norm_results(add_norm, (0, 6), torch.float32)
    assert [x.shape for x in nothing] == [(0, 6)] * 4 + [(6,)]
    assert not nothing[-1].any()
    h, branch = (torch.ones(2, 6, requires_grad=True) for _ in range(2))
    found = torch.autograd.grad(add_norm(h, branch, torch.ones(6))[0].square().sum(), (h, branch))
    assert all(torch.equal(x, torch.full((2, 6), 4.0)) for x in found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_inputs_are_what_they_say(case):
    """Values and gradients in float64 against the steps one by one, by autograd."""
    tensors = input_tensors(case, torch.float64)
    results = [input_results(f, case, tensors) for f in (attention_inputs, plain_inputs)]
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 1e-12


def test_low_precision_is_rounded_once():
    """bfloat16 in, bfloat16 out: no further from float64 than the steps one by one. Gradients of narrow weights come
    from gradients that were rounded first."""
    case = CASES[0]
    tensors = input_tensors(case, torch.bfloat16)
    variants = ((attention_inputs, None), (plain_inputs, None), (plain_inputs, torch.float64))
    results = zip(*(input_results(f, case, tensors, kind) for f, kind in variants), strict=True)
    names = ("q", "k", "v", "pre", *(f"gradient of {name}" for name in tensors[0]))
    for name, (ours, theirs, exact) in zip(names, results, strict=True):
        assert ours.dtype == theirs.dtype
        bound = 2**-8 if name in ("gradient of gates", "gradient of keep") else 1.05 * relative_error(theirs, exact)
        assert relative_error(ours, exact) <= bound, name


def test_under_autocast_gates_keep_their_precision(monkeypatch):
    """The path of a GPU, on the CPU: products in bfloat16, what gates make of x in float32, gradients as wide as
    the weights."""
    monkeypatch.setattr(linear, "in_pieces", lambda x: True)
    case = CASES[0]
    tensors = input_tensors(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = input_results(attention_inputs, case, tensors)
    exact = input_results(plain_inputs, case, tensors, torch.float64)
    assert [x.dtype for x in ours] == [torch.bfloat16] * 3 + [torch.float32] * 8
    bounds = [1e-2] * 3 + [1e-5] + [2e-2] * 7
    for number, (one, other, bound) in enumerate(zip(ours, exact, bounds, strict=True)):
        assert relative_error(one, other) <= bound, number


def test_what_nobody_uses_has_no_gradient():
    leaves, options, _ = input_tensors(CASES[0], torch.float64)
    for used in range(4):
        results = []
        for function in (attention_inputs, plain_inputs):
            found = called(function, CASES[0], leaves, options)[used].square().sum()
            found = torch.autograd.grad(found, list(leaves.values()), allow_unused=True, materialize_grads=True)
            results.append(found)
        for ours, theirs in zip(*results, strict=True):
            assert relative_error(ours, theirs) <= 1e-12


def test_a_narrow_norm_is_rounded_once():
    results = [
        norm_results(f, (40, 96), torch.bfloat16, kind=kind)
        for f, kind in ((add_norm, None), (plain_add_norm, None), (plain_add_norm, torch.float64))
    ]
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, exact) <= 1.01 * relative_error(theirs, exact)


def test_norms_stacked_by_vmap():
    """Replicas with weights of their own: values and gradients as one by one."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, *shape, dtype=torch.float64).requires_grad_() for shape in ((2, 5, 6), (2, 5, 6), (6,))]
    stacked = torch.vmap(add_norm)(*leaves)
    single = [torch.stack(x) for x in zip(*(add_norm(*x) for x in zip(*leaves, strict=True)), strict=True)]
    gradients = [torch.autograd.grad(sum(x.pow(3).sum() for x in found), leaves) for found in (stacked, single)]
    for ours, theirs in ((stacked, single), gradients):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shared", [True, False], ids=["one table", "a table a replica"])
def test_stacked_by_vmap(shared):
    """Replicas with weights of their own, two rows each: values and gradients as one by one."""
    size, case = 3, CASES[0]
    sets = [input_tensors(case, torch.float64, seed=seed) for seed in range(size)]
    leaves = {name: torch.stack([s[0][name].detach() for s in sets]).requires_grad_() for name in sets[0][0]}
    cos, sin = (x if shared else torch.stack([x, 2 * x, 3 * x]) for x in sets[0][1]["table"])

    def call(leaves, cos, sin):
        return called(attention_inputs, case, leaves, {"table": (cos, sin)})

    stacked = torch.vmap(call, in_dims=(0, None, None) if shared else 0)(leaves, cos, sin)
    one_by_one = [
        call({name: x[i] for name, x in leaves.items()}, *(x if shared else x[i] for x in (cos, sin)))
        for i in range(size)
    ]
    gradients = []
    for found in (stacked, [torch.stack(x) for x in zip(*one_by_one, strict=True)]):
        total = sum(x.square().sum() + x.pow(3).sum() for x in found)
        gradients.append(torch.autograd.grad(total, list(leaves.values())))
    for x, y in zip(stacked, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
    packed = torch.randn(3, 2, 4, 6, requires_grad=True)
    torch.testing.assert_close(torch.vmap(swiglu, in_dims=2)(packed), plain_swiglu(packed.movedim(2, 0)))


def test_operators_keep_their_promises():
    case = CASES[0]
    leaves, options, _ = input_tensors(case, torch.float32)
    x = leaves["x"]
    narrow = torch.cat((leaves["gates"], leaves["keep"])).detach()
    both = torch.cat((leaves["weight"].detach(), narrow, torch.zeros(6, case.width)))
    stack = [y.detach().unsqueeze(0).requires_grad_() for y in (leaves["weight"], narrow)]
    norms = [leaves[name].detach().unsqueeze(0).requires_grad_() for name in ("q_norm", "k_norm")]
    arguments = (
        *(
            x,
            None,
            both.unsqueeze(0),
            *stack,
            leaves["bias"].detach().unsqueeze(0).requires_grad_(),
            *norms,
            *options["table"],
            None,
        ),
        *(case.heads, case.kv_heads, False, False, 1e-6),
    )
    torch.library.opcheck(torch.ops.zoo.attention_inputs.default, arguments)
    torch.library.opcheck(torch.ops.zoo.swiglu.default, (torch.randn(3, 4, 6, requires_grad=True),))
    h, branch, weight = (torch.randn(n, 6, requires_grad=True) for n in (4, 4, 1))
    torch.library.opcheck(torch.ops.zoo.add_norm.default, (h, branch, weight, 1e-6))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        swiglu(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="bfloat16"):
        add_norm(torch.zeros(3, 6), torch.zeros(3, 6).bfloat16(), torch.ones(6))
    with pytest.raises(ValueError, match=r"weight \(5,\)"):
        add_norm(torch.zeros(3, 6), torch.zeros(3, 6), torch.ones(5))
    x, weight, keep = torch.zeros(1, 4, 5), torch.zeros(48, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"3 query heads"):
        attention_inputs(x, weight, keep, 3)
    with pytest.raises(ValueError, match=r"keep \(3, 5\)"):
        attention_inputs(x, weight, keep[:3], 2)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        attention_inputs(x, weight, keep, 2, gates=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="norms have shapes"):
        attention_inputs(x, weight, keep, 2, norms=(torch.ones(16), torch.ones(8)))
