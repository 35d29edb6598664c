"""Attention of one new token over a ring of remembered keys (DESIGN.md section 5)."""

import torch
from torch import Tensor

from zoo.ops import backend
from zoo.ops.reference import accumulator
from zoo.ops.stacking import stack_rows


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, live: Tensor, *, scale: float | None = None
) -> Tensor:
    """softmax over the slots 0 <= s < live of scale * q . k_s + decay_s, times v_s. The slots may be in any order.

    q (B,1,H,D); k, v (B,S,G,D), H a multiple of G, one dtype; decay (B,S,H) float32 <= 0, each slot's log-decay
    relative to now, or None; live (B,) int32, how many slots of each row are filled (its own token among them: with
    live = 0 the row's output is 0). Slots beyond live may hold anything, NaN too. Returns (B,1,H,D) in q's dtype.
    Inference only: no gradient. Never looks at a value, so a step can be a CUDA graph.
    Raises ValueError for shapes or dtypes other than these.
    """
    if not q.dim() == k.dim() == 4:
        raise ValueError(f"ring_attention: q is {tuple(q.shape)} and k {tuple(k.shape)}; they take four dimensions")
    batch, queries, heads, dim = q.shape
    slots, kv_heads = k.shape[1], k.shape[2]
    if queries != 1:
        raise ValueError(f"ring_attention: q has {queries} tokens, it takes exactly one")
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise ValueError(
            f"ring_attention: q {tuple(q.shape)} needs k and v (B, slots, G, D) with H a multiple of G, "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"ring_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one dtype is needed")
    if decay is not None and decay.shape != (batch, slots, heads):
        raise ValueError(f"ring_attention: decay has shape {tuple(decay.shape)}, not {(batch, slots, heads)}")
    if decay is not None and decay.dtype not in {torch.float32, accumulator(q.dtype)}:
        raise ValueError(f"ring_attention: decay is {decay.dtype}, it takes {accumulator(q.dtype)}")
    if live.shape != (batch,) or live.dtype != torch.int32:
        raise ValueError(f"ring_attention: live is {live.dtype} {tuple(live.shape)}; it takes int32 {(batch,)}")
    return _ring_attention(q, k, v, decay, live, dim**-0.5 if scale is None else scale)


@torch.library.custom_op("zoo::ring_attention", mutates_args=())
def _ring_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, live: Tensor, scale: float) -> Tensor:
    kernels = backend.choose("ring", q.device, q.dtype, q.shape[3])
    with torch.autocast(q.device.type, enabled=False):
        return kernels.ring_attention(q, k, v, decay, live, scale)


@_ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, live: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


stack_rows(_ring_attention)
