"""vmap over operators: S stacked calls are one folded call, with each call's own values and gradients."""

import pytest
import torch

from zoo import ops

S, B, T, H, G, D = 3, 2, 13, 4, 2, 8


def tensors(*shapes):
    return [torch.randn(S, *shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def attention_inputs():
    return tensors((B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H), (B, T, H))


def gated(q, k, v, z, u):
    return ops.gated_window_attention(q, k, v, z, u, window=5)


def plain(q, k, v, z, u):
    out, lse = ops.window_attention(
        q, k, v, window=4, key_start=torch.tensor([0, 2], dtype=torch.int32), return_lse=True
    )
    return out + lse.unsqueeze(-1).clamp(min=-9)


def sparse(q, k, v, z, u):
    gates = torch.sigmoid(torch.stack((z, u, z + u), dim=-1))
    return ops.nsa_attention(q, k, v, gates, ops.log_decay(z, u), block=2, top=3, window=4)


def loss(q, k, v, z, u):
    targets = torch.arange(B * T).remainder(H).view(B, T).masked_fill(torch.arange(T) % 3 == 0, -100)
    total, count = ops.linear_cross_entropy(q[:, :, 0], k[0, :H, 0], targets)
    return total / count


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("call", [gated, plain, sparse, loss], ids=lambda call: call.__name__)
def test_a_stack_is_its_members(call, compiled):
    inputs = attention_inputs()
    stacked = torch.vmap(call)
    if compiled:
        torch._dynamo.reset()
        stacked = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    together = stacked(*inputs)
    alone = torch.stack([call(*(x[i] for x in inputs)) for i in range(S)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(alone)
    used = [
        x for x in inputs if torch.autograd.grad(alone.sum(), x, allow_unused=True, retain_graph=True)[0] is not None
    ]
    ours = torch.autograd.grad((together * weight).sum(), used)
    theirs = torch.autograd.grad((alone * weight).sum(), used)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_arguments_that_are_the_same_for_all():
    q, k, v, z, u = attention_inputs()
    together = torch.vmap(gated, in_dims=(0, 0, None, 0, None))(q, k, v[0], z, u[0])
    for i in range(S):
        torch.testing.assert_close(together[i], gated(q[i], k[i], v[0], z[i], u[0]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_step_over_rings():
    q, k, v, decay = tensors((B, 1, H, D), (B, T, G, D), (B, T, G, D), (B, T, H))
    live = torch.tensor([4, 13], dtype=torch.int32)
    together = torch.vmap(ops.ring_attention, in_dims=(0, 0, 0, 0, None))(q, k, v, -decay.abs(), live)
    for i in range(S):
        alone = ops.ring_attention(q[i], k[i], v[i], -decay[i].abs(), live)
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


def test_packed_documents_are_refused_by_name():
    q, k, v, _, _ = attention_inputs()
    bounds = torch.tensor([0, 5, T], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens.* cannot be stacked"):
        torch.vmap(lambda q, k, v: ops.window_attention(q, k, v, window=3, cu_seqlens=bounds))(
            q[:, :1], k[:, :1], v[:, :1]
        )
