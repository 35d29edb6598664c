"""What stands between a block's products, on a CUDA device: against float64, and no worse than torch's own steps.

pytest -m gpu tests/ops/test_block_gpu.py
"""

import dataclasses
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from tests.ops.block_cases import (
    CASES,
    input_results,
    input_tensors,
    norm_results,
    plain_add_norm,
    plain_inputs,
    plain_swiglu,
)
from tests.ops.definition import relative_error, root_mean_square_error
from zoo.ops import (
    add_norm,
    attention_inputs,
    backend,
    mlp_in_pieces,
    precise_linear,
    ring_attention,
    swiglu,
    wide_linear,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# The shape of a 125M model, and one whose heads and head_dim fill no tile
LARGE = [
    dataclasses.replace(CASES[0], name="125m", heads=12, kv_heads=12, dim=64, tokens=1001, width=768, gates=24),
    dataclasses.replace(CASES[1], name="padded", heads=6, kv_heads=2, dim=80, tokens=300),
    dataclasses.replace(CASES[0], name="wide", heads=32, kv_heads=8, dim=128, tokens=130, width=200, gates=64),
]


DRAWS = 16  # of a small case's tensors


@pytest.fixture(autouse=True)
def kernels_run():
    assert backend.explain("qkv", "cuda", torch.bfloat16, 64)[0] == "triton"


def assert_no_further(ours, theirs, exact, name, allowed, record):
    """The error's root mean square is at most that of torch's steps, or `allowed`. The largest error is that of one
    rounding out of thousands: where both ways round the same number of times, either may be half as large again.
    `pytest --junitxml` tells both."""
    errors = [root_mean_square_error(x, exact) for x in (ours, theirs)]
    largest = [relative_error(x, exact) for x in (ours, theirs)]
    record(name, {"numbers": exact.numel(), "root mean square": errors, "largest": largest, "allowed": allowed})
    assert errors[0] <= max(1.01 * errors[1], allowed), (name, errors)
    assert largest[0] <= max(1.5 * largest[1], 2 * allowed), (name, largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_attention_inputs_are_no_further_from_float64_than_their_steps(case, dtype, record_property):
    """Narrow products are sums of pieces, and the gradients of their weights come from gradients that were rounded."""
    draws = [input_tensors(case, dtype, "cuda", seed) for seed in range(DRAWS if case.width < 100 else 1)]
    variants = ((attention_inputs, None), (plain_inputs, None), (plain_inputs, torch.float64))
    found = [[input_results(f, case, tensors, kind) for tensors in draws] for f, kind in variants]
    names = (
        *(["q", "k", "v", "pre"] if case.gates else ["q", "k", "v"]),
        *(f"gradient of {name}" for name in draws[0][0]),
    )
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 3e-6}[dtype]
    allowed = {"pre": 2**-16, "gradient of gates": rounding}
    results = zip(*(zip(*draws, strict=True) for draws in found), strict=True)
    for name, (ours, theirs, exact) in zip(names, results, strict=True):
        stacked = [torch.stack(results) for results in (ours, theirs, exact)]
        assert_no_further(*stacked, name, allowed.get(name, 3e-6), record_property)
    again = input_results(attention_inputs, case, draws[0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], again, strict=True))


def test_a_weights_gradient_is_not_rounded_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 1001, n, generator=generator).to("cuda", torch.bfloat16) for n in (768, 256))
    weight = torch.randn(256, 768, generator=generator).cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = wide_linear(x, weight)
    (found,) = torch.autograd.grad(y, weight, dy)
    exact = dy.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    assert found.dtype == torch.float32
    assert relative_error(found, exact) <= 1e-5


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_an_mlp_in_pieces_is_no_further_from_float64_than_in_one(gated, monkeypatch, record_property):
    """Under autocast; and never more of its inner activations than a piece's."""
    # a product of few rows is split along K, and torch lets cuBLAS round the partial sums to bfloat16
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((1, 20001, 256), (2048 if gated else 1024, 256), (256, 1024))
    leaves = [0.1 * torch.randn(size, generator=generator, device="cuda") for size in sizes]
    dy = torch.randn(sizes[0], generator=generator, device="cuda").bfloat16()

    def whole(x, up, down):
        projected = F.linear(x, up)
        return F.linear(plain_swiglu(projected) if gated else F.gelu(projected), down)

    found, peaks = [], []
    pieces = partial(mlp_in_pieces, tokens=1000, gated=gated)
    for function, dtype in ((pieces, torch.float32), (whole, torch.float32), (whole, torch.float64)):
        own = [x.to(dtype).requires_grad_() for x in leaves]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            y = function(*own)
        found.append([y.detach(), *torch.autograd.grad(y, own, dy.to(y.dtype))])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for name, *results in zip(("y", "dx", "dup", "ddown"), *found, strict=True):
        assert_no_further(*results, name, 1e-6, record_property)
    assert peaks[0] < peaks[1] / 2


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
        qkv = torch.randn(2, 33, 6, 64, generator=generator).to(device, torch.bfloat16)
        weights = [0.1 * torch.randn(n, 128, generator=generator).to(device) for n in (6 * 64, 4)]
        leaves = (x, *(y.requires_grad_() for y in weights))
        weight = torch.randn(12, 128, generator=generator).to(device)
        outputs = [swiglu(x), *add_norm(x, x, torch.ones(128, device=device)), *attention_inputs(x, *weights, 2)]
        outputs.append(precise_linear(x, weight))
        grads = torch.autograd.grad(sum(y.float().sum() for y in outputs), leaves)
        q, live = qkv[:, :1, :2], torch.full((2,), 33, dtype=torch.int32, device=device)
        ring = ring_attention(q, qkv[:, :, 2:4], qkv[:, :, 4:], None, live)
        return [y.detach().cpu() for y in (*outputs, *grads, ring)]

    for here, there in zip(everything("cuda:0"), everything("cuda:1"), strict=True):
        torch.testing.assert_close(here, there)
