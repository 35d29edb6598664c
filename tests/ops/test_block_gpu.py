"""What stands between a block's products, on a CUDA device: against float64, and no worse than torch's own steps.

pytest -m gpu tests/ops/test_block_gpu.py
"""

import dataclasses
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.ops.block_cases import CASES, norm_results, plain_add_norm, plain_qkv, plain_swiglu, qkv_tensors
from tests.ops.definition import relative_error
from zoo.ops import add_norm, backend, precise_linear, prepare_qkv, ring_attention, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# The shape of a 125M model, and one whose heads and head_dim fill no tile
LARGE = [
    dataclasses.replace(CASES[0], name="125m", heads=12, kv_heads=12, dim=64, tokens=1001),
    dataclasses.replace(CASES[1], name="padded", heads=6, kv_heads=2, dim=80, tokens=300),
    dataclasses.replace(CASES[0], name="wide", heads=32, kv_heads=8, dim=128, tokens=130),
]


@pytest.fixture(autouse=True)
def kernels_run():
    assert backend.explain("qkv", "cuda", torch.bfloat16, 64)[0] == "triton"


def results(function, case, tensors, grads, kind=None):
    leaves = [tensors["qkv"], tensors["keep"], *(tensors["norms"] or ())]
    leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in leaves]
    found = function(leaves[0], leaves[1], case.heads, **tensors["options"], norms=tuple(leaves[2:]) or None)
    return [x.detach() for x in found] + list(
        torch.autograd.grad(found, leaves, [g.to(x.dtype) for g, x in zip(grads, found, strict=True)])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_qkv_are_no_further_from_float64_than_their_steps(case, dtype):
    tensors, grads = qkv_tensors(case, dtype, "cuda")
    found = [
        results(f, case, tensors, grads, kind)
        for f, kind in ((prepare_qkv, None), (plain_qkv, None), (plain_qkv, torch.float64))
    ]
    for number, (ours, theirs, exact) in enumerate(zip(*found, strict=True)):
        errors = relative_error(ours, exact), relative_error(theirs, exact)
        assert errors[0] <= 1.05 * errors[1] + 2e-6, (number, errors)
    again = results(prepare_qkv, case, tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1000, 2048), (33, 1100), (5, 7)])
def test_swiglu_is_no_further_from_float64_than_its_steps(rows, width, dtype):
    torch.manual_seed(0)
    packed = (2 * torch.randn(rows, 2 * width, device="cuda")).to(dtype).requires_grad_()
    grad = torch.randn(rows, width, device="cuda").to(dtype)
    wide = packed.detach().double().requires_grad_()
    found = []
    for function, x in ((swiglu, packed), (plain_swiglu, packed), (plain_swiglu, wide)):
        y = function(x)
        found.append((y.detach(), torch.autograd.grad(y, x, grad.to(x.dtype))[0]))
    for ours, theirs, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(8, 1001, 768), (33, 100), (3, 5000), (70, 12288)], ids=str)
@pytest.mark.parametrize("sum_used", [True, False])
def test_a_norm_is_no_further_from_float64_than_its_steps(shape, dtype, sum_used):
    found = [
        norm_results(f, shape, dtype, "cuda", kind=kind, sum_used=sum_used)
        for f, kind in ((add_norm, None), (plain_add_norm, None), (plain_add_norm, torch.float64))
    ]
    for number, (ours, theirs, exact) in enumerate(zip(*found, strict=True)):
        errors = relative_error(ours, exact), relative_error(theirs, exact)
        assert errors[0] <= 1.05 * errors[1] + 2e-6, (number, errors)
    again = norm_results(add_norm, shape, dtype, "cuda", sum_used=sum_used)
    assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gates_run_on_the_tensor_cores(compiled):
    """Under autocast, from float32 activations: neither direction takes a float32 product."""
    x = torch.randn(4096, 768, device="cuda", requires_grad=True)
    weight = torch.randn(24, 768, device="cuda", requires_grad=True)
    operator = torch.compile(precise_linear, fullgraph=True) if compiled else precise_linear

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y = operator(x, weight)
        y.sum().backward()

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            step()
            torch.cuda.synchronize()
    names = [event.key for event in recorded.key_averages()]
    assert any("narrow_kernel" in name for name in names), names
    assert not [name for name in names if "f32f32_f32f32" in name or "sgemm" in name]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are_not_on_the_current_device():
    def everything(device):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 33, 128, generator=generator).to(device, torch.bfloat16).requires_grad_()
        qkv = torch.randn(2, 33, 6, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
        keep = torch.randn(2, 33, 4, generator=generator).to(device)
        weight = torch.randn(12, 128, generator=generator).to(device)
        outputs = [swiglu(x), *add_norm(x, x, torch.ones(128, device=device)), *prepare_qkv(qkv, keep, 2)]
        outputs.append(precise_linear(x, weight))
        grads = torch.autograd.grad(sum(y.float().sum() for y in outputs), (x, qkv))
        q, live = qkv[:, :1, :2].detach(), torch.full((2,), 33, dtype=torch.int32, device=device)
        ring = ring_attention(q, qkv[:, :, 2:4].detach(), qkv[:, :, 4:].detach(), None, live)
        return [y.detach().cpu() for y in (*outputs, *grads, ring)]

    for here, there in zip(everything("cuda:0"), everything("cuda:1"), strict=True):
        torch.testing.assert_close(here, there)
