"""What stands between a block's products, as operators: SwiGLU's product, the norm of a sum, and q, k and v made ready
for attention.

The reference path here; the kernels in tests/kernels/interpreted_block.py and tests/ops/test_block_gpu.py.
"""

import pytest
import torch

from tests.ops.block_cases import CASES, norm_results, plain_add_norm, plain_qkv, plain_swiglu, qkv_tensors
from tests.ops.definition import relative_error
from zoo.ops import add_norm, prepare_qkv, swiglu


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
def test_qkv_are_what_they_say(case):
    """Values and gradients in float64 against the steps one by one, by autograd."""
    tensors, grads = qkv_tensors(case, torch.float64)
    leaves = [x for x in (tensors["qkv"], tensors["keep"], *(tensors["norms"] or ())) if x is not None]
    results = []
    for function in (prepare_qkv, plain_qkv):
        found = function(tensors["qkv"], tensors["keep"], case.heads, **tensors["options"], norms=tensors["norms"])
        results.append([*found, *torch.autograd.grad(found, leaves, grads)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-12


def test_low_precision_is_rounded_once():
    """bfloat16 in, bfloat16 out: no further from float64 than the steps one by one."""
    case = CASES[0]
    tensors, _ = qkv_tensors(case, torch.bfloat16)
    arguments = (tensors["qkv"], tensors["keep"], case.heads)
    options = {**tensors["options"], "norms": tensors["norms"]}
    exact = plain_qkv(tensors["qkv"].double(), tensors["keep"].double(), case.heads, **options)
    ours, theirs = prepare_qkv(*arguments, **options), plain_qkv(*arguments, **options)
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative_error(one.detach(), truth.detach()) <= 1.01 * relative_error(other.detach(), truth.detach())


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
    sets = [qkv_tensors(case, torch.float64, seed=seed) for seed in range(size)]
    qkv, keep, q_weight, k_weight = (
        torch.stack([pick(tensors).detach() for tensors, _ in sets]).requires_grad_()
        for pick in (lambda t: t["qkv"], lambda t: t["keep"], lambda t: t["norms"][0], lambda t: t["norms"][1])
    )
    table = sets[0][0]["options"]["table"]
    tables = tuple(x if shared else torch.stack([x, 2 * x, 3 * x]) for x in table)

    def call(qkv, keep, q_weight, k_weight, cos, sin):
        return prepare_qkv(qkv, keep, case.heads, norms=(q_weight, k_weight), table=(cos, sin))

    stacked = torch.vmap(call, in_dims=(0, 0, 0, 0, *([None, None] if shared else [0, 0])))(
        qkv, keep, q_weight, k_weight, *tables
    )
    one_by_one = [
        call(qkv[i], keep[i], q_weight[i], k_weight[i], *(x if shared else x[i] for x in tables)) for i in range(size)
    ]
    leaves = (qkv, keep, q_weight, k_weight)
    gradients = []
    for found in (stacked, [torch.stack(x) for x in zip(*one_by_one, strict=True)]):
        gradients.append(torch.autograd.grad(sum(x.square().sum() + x.pow(3).sum() for x in found), leaves))
    for x, y in zip(stacked, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
    packed = torch.randn(3, 2, 4, 6, requires_grad=True)
    torch.testing.assert_close(torch.vmap(swiglu, in_dims=2)(packed), plain_swiglu(packed.movedim(2, 0)))


def test_operators_keep_their_promises():
    tensors, _ = qkv_tensors(CASES[0], torch.float32)
    stack = (x.detach().unsqueeze(0).requires_grad_() for x in tensors["norms"])
    arguments = (
        tensors["qkv"],
        tensors["keep"],
        *stack,
        *tensors["options"]["table"],
        None,
        CASES[0].heads,
        False,
        1e-6,
    )
    torch.library.opcheck(torch.ops.zoo.prepare_qkv.default, arguments)
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
    qkv, keep = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match=r"3 query heads"):
        prepare_qkv(qkv, keep, 3)
    with pytest.raises(ValueError, match=r"keep is \(1, 4, 3\)"):
        prepare_qkv(qkv, keep[..., :3], 2)
    with pytest.raises(ValueError, match="norms have shapes"):
        prepare_qkv(qkv, keep, 2, norms=(torch.ones(16), torch.ones(8)))
