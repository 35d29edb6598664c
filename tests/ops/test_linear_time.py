"""The CPU path is linear in the length: in time, and in memory."""

import statistics
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.ops import gated_window_attention, nsa, nsa_attention, reference, reference_nsa, window_attention


def step(length, heads=4, dim=64, window=256):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, dim, requires_grad=True) for _ in range(3))
    z, u = (torch.randn(1, length, heads, requires_grad=True) for _ in range(2))

    def run():
        gated_window_attention(q, k, v, z, u, window=window).sum().backward()

    return run


@pytest.mark.slow
def test_a_step_of_four_times_the_length_costs_at_most_4_6_times_as_much():
    """Pairs measured back to back, so that what else the machine does weighs on both."""
    short, long = step(2048), step(8192)
    short(), long()
    ratios = []
    for _ in range(7):
        times = []
        for run in (short, long):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    assert statistics.median(ratios) <= 4.6, ratios


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_grows_with_the_square_of_the_length():
    """The largest tensor that any operation makes, forward and backward, at two lengths."""
    sizes = []
    for length in (1024, 4096):
        q, k, v = torch.randn(3, 1, length, 2, 16)
        decay = -torch.rand(1, length, 2)
        options = {"window": 64, "scale": 0.25, "spans": None}
        with Largest() as largest:
            out, lse = reference.window_forward(q, k, v, (decay,), **options)
            reference.window_backward(out, None, q, k, v, out, lse, (decay,), **options)
        sizes.append(largest.numel)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] <= 4096 * 2 * 16


@pytest.mark.parametrize("branch", ["compressed", "selected"])
def test_no_tensor_has_all_queries_times_all_blocks(branch):
    """Forward and backward: the scores of the choice among them, which 8,192 queries have of 512 blocks each."""
    length, block = 8192, 16
    q, k, v = torch.randn(length, 2, 16)[None], *torch.randn(2, 1, length, 1, 16)
    geometry = reference_nsa.Geometry(block, block, block, 4)
    means = reference_nsa.pool_forward([k, v], block)
    places = nsa._compressed_places(q, means[0], geometry, None, None)
    with Largest() as largest:
        out, lse, index = reference_nsa.compressed_forward(q, *means, places, geometry, 0.25)
        if branch == "compressed":
            reference_nsa.compressed_backward(out, None, q, *means, out, lse, places, geometry, 0.25)
        else:
            out, lse = reference_nsa.selected_forward(q, k, v, index, places, block, 0.25)
            reference_nsa.selected_backward(out, None, q, k, v, out, lse, index, places, block, 0.25)
    assert largest.numel <= reference_nsa.CHUNK_ELEMENTS < length * length // block


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_sparse_attention_takes_memory_in_proportion_to_the_length():
    """Forward and backward; scores of all blocks, even summed over the query heads, would quadruple."""
    peaks = []
    for length in (16384, 32768):
        q, k, v = (torch.randn(1, length, n, 64, device="cuda", dtype=torch.bfloat16) for n in (16, 1, 1))
        leaves = [x.requires_grad_() for x in (q, k, v, torch.rand(1, length, 16, 3, device="cuda"))]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = nsa_attention(*leaves, block=16, top=4, window=64)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del q, k, v, leaves, out
    assert peaks[1] <= 2.1 * peaks[0]


def test_a_long_window_free_call_is_cut_along_the_queries():
    """window None: time is quadratic, but no T x T tensor is made (T = 20,000 would take 1.6 GB per head)."""
    q, k, v = torch.randn(3, 1, 20_000, 1, 8)
    assert window_attention(q, k, v).isfinite().all()
