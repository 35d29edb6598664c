"""Gated windowed attention in plain PyTorch: the definition, and the blocked path that CPUs run.

    out_t = sum_j p_tj v_j,   p_t = softmax_j(scale * q_t . k_j + B_tj),   B_tj = sum_{i=j+1..t} log_decay_i

over the visible keys max(start_t, t - window + 1) <= j <= t (SPEC.md 1.4). Two programs compute it:

- `definition` writes the T x T mask down. Any dtype, differentiable by autograd, quadratic: the oracle of the tests.
- `window_forward` and `window_backward` walk the queries in blocks and look at each block's own keys only, so time and
  memory are linear in T for a fixed window. They are the `reference` back end: any device, float64 included.

Shapes: q (B,T,H,D); k, v (B,N,G,D) with N >= T and H a multiple of G; log_decay (B,N,H). Query i stands at N - T + i.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import EPS, KEPT_TILE

BLOCK = 128  # queries per step of the blocked path: more wastes hidden keys, fewer wastes calls
# Logits per step; above it the block shrinks: on a CPU, so that a step stays in cache; elsewhere, where a step is a few
# dozen short kernels, so that it stays under 128 MiB a tensor
BLOCK_ELEMENTS, BLOCK_ELEMENTS_GPU = 1 << 20, 1 << 25

# First visible key of each query, one past the last query that sees each key: spans (B,N) int32, by position. The same
# of tiles, where tiles are pruned: kept (B,G,tiles) int32 (zoo/ops/prune.py).
Bounds = tuple[Tensor, Tensor]


def activate(z: Tensor, u: Tensor, eps: float = EPS) -> Tensor:
    """-softplus(-beta z) / (beta + eps) with beta = 1 + elu(u); float64 stays, everything else becomes float32."""
    wide = accumulator(z.dtype)
    z, u = z.to(wide), u.to(wide)
    beta = u.clamp(max=0).exp() + u.relu()  # 1 + elu(u), exact where u is very negative
    return F.logsigmoid(beta * z) / (beta + eps)


def activate_backward(grad: Tensor, z: Tensor, u: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Gradients of `activate` in z and u, in their dtypes (SPEC.md 2.1)."""
    wide_z, wide_u = z.to(grad.dtype), u.to(grad.dtype)
    slope = wide_u.clamp(max=0).exp()
    beta = slope + wide_u.relu()
    closing = torch.sigmoid(-beta * wide_z)
    divisor = beta + eps
    dz = grad * beta * closing / divisor
    du = grad * slope * (wide_z * closing - F.logsigmoid(beta * wide_z) / divisor) / divisor
    return dz.to(z.dtype), du.to(u.dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of lse and of the gate: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_spans(cu_seqlens: Tensor, length: int) -> Bounds:
    """Start and end of each token's document, (1, length) int32, without a device sync. Documents may be empty."""
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True)
    return cu_seqlens[document - 1][None].int(), cu_seqlens[document][None].int()


def key_start_spans(key_start: Tensor, length: int) -> Bounds:
    """The same pair for rows whose first valid key is key_start (B,) int32. No query sees the keys before it."""
    token = torch.arange(length, device=key_start.device, dtype=torch.int32)
    end = torch.where(token < key_start[:, None], 0, length).int()
    return key_start.int()[:, None].expand(-1, length), end


def visible_spans(spans: Bounds | None, kept: Bounds | None, length: int) -> Bounds | None:
    """Both in one, by position: (B,N), or (B,G,N) where tiles are pruned."""
    if kept is None:
        return spans
    start, end = (KEPT_TILE * x.repeat_interleave(KEPT_TILE, dim=2)[:, :, :length] for x in kept)
    end = end.clamp(max=length)
    if spans is None:
        return start, end
    return torch.maximum(start, spans[0].unsqueeze(1)), torch.minimum(end, spans[1].unsqueeze(1))


# ------------------------------------------------------------------------------------------------ the definition


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    spans: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B,T,H,D) and natural-log lse (B,T,H), written down as in the module's docstring. O(T N) memory."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if log_decay is not None:
        prefix = log_decay.double().cumsum(1).transpose(1, 2)
        bias = prefix[:, :, keys - queries :, None] - prefix[:, :, None, :]
        logits = logits + bias.to(logits.dtype)
    token = torch.arange(keys, device=q.device)
    visible = _visible(token[keys - queries :], token, window, spans)
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(heads // visible.shape[1], dim=1)
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("bhts,bshd->bthd", p, v), lse.transpose(1, 2).to(accumulator(q.dtype))


def _visible(query: Tensor, key: Tensor, window: int | None, spans: Bounds | None) -> Tensor:
    """Bool mask (1 or B, 1 or G, queries, keys) from absolute positions."""
    distance = query[:, None] - key[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if spans is None:
        return visible[None, None]
    start = spans[0][..., query]
    visible = visible & (key >= start[..., None])
    return visible if start.dim() == 3 else visible[:, None]


# ---------------------------------------------------------------------------------------------- the blocked path
#
# Everything is held per key/value head: q (B,G,R,T,D) with R = H/G query heads that share one k, v (B*G,N,D). The R
# heads of a group are rows of one matrix product, so keys and values are never repeated.


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: Bounds | None,
    kept: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H); gate is () for none, (log_decay,) or (z, u). No autograd."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    wide = accumulator(q.dtype)
    keys, values, decay = _by_head(k, wide), _by_head(v, wide), _decay_by_head(gate, kv_heads)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=wide)
    seen = visible_spans(spans, kept, k.shape[1])
    for block in _blocks(q, k, window, seen):
        rows, cols = block
        queries = _rows_by_group(q, rows, kv_heads, wide)
        logits, own = _bias_and_mask(q, k, block, decay, window, seen)
        logits = logits.view(batch * kv_heads, -1, cols.stop - cols.start)
        logits.baddbmm_(queries, keys[:, cols].mT, alpha=scale)
        top = logits.amax(-1, keepdim=True)
        if seen is not None:
            top.masked_fill_(top == -torch.inf, 0)  # a row that sees nothing: p = 0, lse = -inf
        p = logits.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        mixed = torch.bmm(p, values[:, cols])
        mixed /= total if seen is None else total.clamp_min(torch.finfo(wide).tiny)
        out[:, rows] = _rows_by_token(mixed, batch, heads, dim)
        row_lse = total.log_().add_(top).view(batch, heads, -1)
        lse[:, rows] = (row_lse if own is None else row_lse - own).transpose(1, 2)
    return out, lse


def window_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: Bounds | None,
    kept: Bounds | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """dq, dk, dv and the gate's gradients (as many as `gate` has), probabilities recomputed from lse."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    wide = accumulator(q.dtype)
    keys, values, decay = _by_head(k, wide), _by_head(v, wide), _decay_by_head(gate, kv_heads)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    dprefix = None if decay is None else torch.zeros_like(decay)
    delta = (out.to(wide) * dout.to(wide)).sum(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing gives p = 0
    if dlse is not None:
        delta = delta - dlse.to(wide).masked_fill(lse == torch.inf, 0)
    seen = visible_spans(spans, kept, k.shape[1])
    for block in _blocks(q, k, window, seen):
        rows, cols = block
        queries, douts = (_rows_by_group(x, rows, kv_heads, wide) for x in (q, dout))
        p, own = _bias_and_mask(q, k, block, decay, window, seen)
        row_lse = lse[:, rows].transpose(1, 2)
        row_lse = (row_lse if own is None else row_lse + own).reshape(batch * kv_heads, -1, 1)
        p = p.view(batch * kv_heads, -1, cols.stop - cols.start).sub_(row_lse)
        p = p.baddbmm_(queries, keys[:, cols].mT, alpha=scale).exp_()
        dv[:, cols] += torch.bmm(p.mT, douts)  # baddbmm_ into a strided slice would be a loop over heads
        row_delta = delta[:, rows].transpose(1, 2).reshape(batch * kv_heads, -1, 1)
        ds = torch.baddbmm(row_delta, douts, values[:, cols].mT, beta=-1).mul_(p)
        dk[:, cols] += torch.bmm(ds.mT, queries).mul_(scale)
        dq[:, rows] = _rows_by_token(torch.bmm(ds, keys[:, cols]).mul_(scale), batch, heads, dim)
        if dprefix is not None:
            ds = ds.view(*dprefix.shape[:3], -1, ds.shape[-1])
            dprefix[..., cols] -= ds.sum(-2)
            # dlse_t in exact arithmetic; what rounding adds must not pile up along the sequence (kernels/window.py)
            dprefix[..., cols.stop - ds.shape[-2] : cols.stop] += ds.sum(-1)
    dgate = () if dprefix is None else _gate_backward(dprefix, gate, spans)
    return dq, _by_token(dk, k), _by_token(dv, v), dgate


def _blocks(q: Tensor, k: Tensor, window: int | None, spans: Bounds | None) -> list[tuple[slice, slice]]:
    """(queries, keys) of each step: a block of rows of q, and the keys that any of them may see."""
    batch, length, heads, _ = q.shape
    offset = k.shape[1] - length
    width = k.shape[1] if window is None else window
    size, most = BLOCK, BLOCK_ELEMENTS if q.device.type == "cpu" else BLOCK_ELEMENTS_GPU
    while size > 16 and batch * heads * size * (size + width) > most:
        size //= 2
    blocks = []
    for first in range(0, length, size):
        last = min(first + size, length)
        lowest = 0 if window is None else max(0, offset + first - window + 1)
        if spans is not None and spans[0].device.type == "cpu":  # a look at the value would stall any other device
            lowest = max(lowest, min(int(spans[0][..., offset + first].min()), offset + first))
        blocks.append((slice(first, last), slice(lowest, offset + last)))
    return blocks


def _bias_and_mask(
    q: Tensor, k: Tensor, block: tuple[slice, slice], decay: Tensor | None, window: int | None, spans: Bounds | None
) -> tuple[Tensor, Tensor | None]:
    """What is added to a block's logits, (B,G,R,rows,cols), and each row's own share of it, (B,H,rows).

    The bias is key-side only: B_ej for the block's last position e. It differs from B_tj by B_et, constant along row t,
    which the softmax ignores and lse gives back (SPEC.md 0.1). Summed from the newest key to the oldest inside this
    block's keys alone, so that its error does not depend on where in the sequence the block stands.
    """
    rows, cols = block
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    offset = k.shape[1] - q.shape[1]
    wide = accumulator(q.dtype)
    query = torch.arange(offset + rows.start, offset + rows.stop, device=q.device)
    key = torch.arange(cols.start, cols.stop, device=q.device)
    hidden = torch.zeros((), dtype=wide, device=q.device).where(_visible(query, key, window, spans), -torch.inf)
    shape = (batch, kv_heads, heads // kv_heads, len(query), len(key))
    if decay is None:
        return hidden[:, :, None].expand(shape).contiguous(), None
    newer = F.pad(decay[..., cols.start + 1 : cols.stop], (0, 1))
    bias = newer.flip(-1).cumsum(-1).flip(-1)
    return hidden[:, :, None] + bias[..., None, :], bias[..., -len(query) :].flatten(1, 2)


def _gate_backward(dprefix: Tensor, gate: tuple[Tensor, ...], spans: Bounds | None) -> tuple[Tensor, ...]:
    """From the gradient of the prefix sum (B,G,R,N) to that of log_decay, or of z and u."""
    dprefix = dprefix.flatten(1, 2)
    grad = dprefix.flip(-1).cumsum(-1).flip(-1)
    if spans is not None:  # what lies beyond the document sums to zero but for rounding, which must not leak either
        after = F.pad(grad, (0, 1)).gather(2, spans[1].long()[:, None].expand(grad.shape))
        grad = grad - after
    grad = grad.transpose(1, 2).contiguous()
    grads = (grad.to(gate[0].dtype),) if len(gate) == 1 else activate_backward(grad, gate[0], gate[1])
    return tuple(x.contiguous() for x in grads)


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,N,G,D) to contiguous (B*G,N,D)."""
    return x.to(dtype).transpose(1, 2).contiguous().flatten(0, 1)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """(B*G,N,D) back to contiguous (B,N,G,D), in the dtype of `like`."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()


def _rows_by_group(x: Tensor, rows: slice, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of (B,T,H,D) as (B*G, R*rows, D)."""
    block = x[:, rows].to(dtype).transpose(1, 2)
    return block.reshape(x.shape[0] * kv_heads, -1, x.shape[3])


def _rows_by_token(x: Tensor, batch: int, heads: int, dim: int) -> Tensor:
    """(B*G, R*rows, D) as (B,rows,H,D)."""
    return x.view(batch, heads, -1, dim).transpose(1, 2)


def _gate_by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B,N,H) to contiguous (B,G,R,N)."""
    return x.transpose(1, 2).contiguous().unflatten(1, (kv_heads, -1))


def _decay_by_head(gate: tuple[Tensor, ...], kv_heads: int) -> Tensor | None:
    if not gate:
        return None
    return _gate_by_head(gate[0] if len(gate) == 1 else activate(gate[0], gate[1]), kv_heads)


# ------------------------------------------------------------------------------------------------ one token over a ring


def ring_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, live: Tensor, scale: float) -> Tensor:
    """As `zoo.ops.ring_attention`: q (B,1,H,D) over the slots [0, live) of k, v (B,S,G,D), decay (B,S,H).

    A CPU takes the slots that some row has filled alone, and copies nothing where every row has as many.
    """
    batch, _, heads, dim = q.shape
    kv_heads, wide = k.shape[2], accumulator(q.dtype)
    look = q.device.type == "cpu" and batch > 0  # at values of `live`, which would stall any other device
    most = max(1, int(live.max())) if look else k.shape[1]
    ragged = not look or int(live.min()) < most
    k, v = k[:, :most].to(wide), v[:, :most].to(wide)
    bias = None if decay is None else decay[:, :most].to(wide).transpose(1, 2).unflatten(1, (kv_heads, -1))
    if ragged:  # a stale slot may hold NaN, and 0 * NaN is NaN
        dead = torch.arange(most, device=q.device) >= live[:, None]
        k, v = (x.masked_fill(dead[..., None, None], 0) for x in (k, v))
        bias = q.new_zeros(batch, kv_heads, heads // kv_heads, most, dtype=wide) if bias is None else bias
        bias = bias.masked_fill(dead[:, None, None], -torch.inf)
    queries = q.to(wide).view(batch, kv_heads, -1, dim)  # the query heads of a key head stand as its queries
    out = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), bias, scale=scale)
    return out.masked_fill((live == 0)[:, None, None, None], 0).reshape(batch, 1, heads, dim).to(q.dtype)


# ------------------------------------------------------------------------------------------------------------ the loss


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """-log softmax(logits)[target] in nats, (N,) float32 (float64 for float64 logits), 0 where the target is
    `ignore_index`; `logits` (N, V) become their own gradients, softmax - onehot, if asked."""
    scored = targets != ignore_index
    place = torch.where(scored, targets, 0).unsqueeze(1)
    wide = logits.to(accumulator(logits.dtype))
    lse = wide.logsumexp(dim=1, keepdim=True)
    loss = torch.where(scored, (lse - wide.gather(1, place)).squeeze(1), 0)
    if needs_grad:
        grad = (wide - lse).exp_()
        grad.scatter_add_(1, place, torch.full_like(lse, -1.0))
        logits.copy_(grad.masked_fill_(~scored.unsqueeze(1), 0))
    return loss
