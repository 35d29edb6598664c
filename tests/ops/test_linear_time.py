"""The CPU path is linear in the length: in time, and in memory."""

import statistics
import time

import pytest
import torch

from zoo.ops import gated_window_attention, window_attention


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


def test_no_tensor_grows_with_the_square_of_the_length():
    """The largest tensor that any operation makes, forward and backward, at two lengths."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    from zoo.ops import reference

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


def test_a_long_window_free_call_is_cut_along_the_queries():
    """window None: time is quadratic, but no T x T tensor is made (T = 20,000 would take 1.6 GB per head)."""
    q, k, v = torch.randn(3, 1, 20_000, 1, 8)
    assert window_attention(q, k, v).isfinite().all()
