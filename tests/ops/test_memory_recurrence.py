"""GatedFWA as an associative memory (SPEC.md 1.2): the operator is a read-out of a contracting windowed memory."""

import pytest
import torch

from zoo.ops import window_attention


@pytest.mark.parametrize("window", [1, 4, 9, 100])
def test_equals_the_associative_memory(window):
    """M_t = e^{-a_t} M_{t-1} - e^{B_{t,t-w}} phi(k_{t-w})^T v_{t-w} + phi(k_t)^T v_t, read by phi(q_t).

    phi(q) . phi(k) = exp(q . k) has no finite feature map, but on T given queries and keys it has a Gram matrix: with
    phi(k_j) = e_j and phi(q_t) = (exp(q_t . k_j))_j the recurrence can be run as it stands. The 1/w of the analysis
    cancels in the softmax: the same memory over v = 1 is the denominator.
    """
    torch.manual_seed(0)
    length, dim = 40, 3
    q, k, v = torch.randn(3, length, dim, dtype=torch.float64)
    decay = -torch.rand(length, dtype=torch.float64)
    features = (q @ k.T).exp()
    values = torch.cat([v, torch.ones(length, 1, dtype=torch.float64)], 1)
    memory = torch.zeros(length, dim + 1, dtype=torch.float64)
    expected = []
    for t in range(length):
        memory = decay[t].exp() * memory
        if t >= window:
            bias = decay[t - window + 1 : t + 1].sum()  # B_{t,t-w}
            memory[t - window] -= bias.exp() * values[t - window]
        memory[t] += values[t]
        read = features[t] @ memory
        expected.append(read[:-1] / read[-1])
    rows = (x[None, :, None] for x in (q, k, v, decay))
    out = window_attention(*rows, window=window, scale=1.0)
    torch.testing.assert_close(out[0, :, 0], torch.stack(expected), rtol=1e-12, atol=1e-12)
