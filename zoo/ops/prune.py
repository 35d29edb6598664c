"""Which key tiles a gate has made negligible (opt in; after adaptive pruning, Lin et al., arXiv 2504.06949).

Logits are s_tj = scale q_t.k_j + sum_{i=j+1..t} g_i with g = log_decay <= 0. Tiles are TILE positions. For each head
let K = max_j |k_j|, C(a, b) the sum of g over the tiles strictly between a and b, n the number of keys that a query may
see, and for a query tile b

    room_b = max_{t in b} |scale| |q_t| (K + |k_t|).

Key tile a is dropped for query tile b, with every tile before it, when   C(a, b) + room_b < log(prune / n).

Theorem. A row loses at most delta <= prune of its probability. With V = max |v_j| then
    |out' - out| <= 2 delta V,      0 <= lse - lse' <= -log(1 - delta),
    and for each row sum_j |dS'_tj - dS_tj| <= 6 delta |dout_t| V  (dS: gradient of out's loss in the logits).
Proof. A query t sees itself, so lse_t >= s_tt >= -|scale| |q_t| |k_t|. For a dropped key, s_tj <= |scale| |q_t| K +
C(a, b): the gates between j and t include those of all tiles between theirs, and none is positive. Hence p_tj <=
exp(room_b + C) < prune / n, and fewer than n keys are dropped. What is kept is rescaled by 1 / (1 - delta), so sum_j
|p'_tj - p_tj| = 2 delta, which bounds out; dS_tj = p_tj (dout_t.(v_j - out_t)) differs by |p' - p| |dout| 2V and by
p |dout| |out' - out|, in sum 4 delta + 2 delta times |dout| V.  (Exact arithmetic; ROUNDING covers that of the norms.)

C falls towards older tiles, so what is kept is a run of the newest tiles; to have its mirror (the queries that keep a
key tile) a run too, a query tile keeps what any later one keeps, which only adds. Query heads that share a key head
share their tiles. Forward and backward take the same ones: the gradients are those of what was computed.

Corollary. Where no row loses more than delta, the gradients of out's loss change by at most
    |dq'_t - dq_t| <= 6 delta |scale| K V |dout_t|,      sum_j |dk'_j - dk_j| <= 6 delta |scale| V sum_t |dout_t| |q_t|,
    |dv'_j - dv_j| <= delta sum_t |dout_t|, over all j together twice that,
    |dg'_i - dg_i| <= 3 delta V sum_{t >= i} |dout_t|
with t over the rows of all query heads that share a key head; for g over those of its own.
Proof. dq_t = scale sum_j dS_tj k_j and dk_j = scale sum_t dS_tj q_t: by the bound on a row. dv_j = sum_t p_tj dout_t;
a dropped key has p_tj <= delta and p'_tj = 0, any other p'_tj - p_tj = delta p'_tj, both at most delta. dg_i =
sum_{t >= i} sum_{j < i} dS_tj; a row's dS adds up to 0 before and after, so a part of it changes by at most half.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64
ROUNDING = 1 + 1e-4


@torch.no_grad()
def first_tiles(q: Tensor, k: Tensor, log_decay: Tensor, *, window: int | None, scale: float, prune: float) -> Tensor:
    """(B,G,tiles) int32: the first key tile kept by each tile of TILE positions; never falls along the tiles.

    q (B,T,H,D), k (B,N,G,D), log_decay (B,N,H): as `window_attention`. Reads q and k once, nothing on the host.
    """
    batch, length, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q_norm = torch.linalg.vector_norm(q, dim=-1, dtype=wide).unflatten(2, (kv_heads, -1))
    k_norm = torch.linalg.vector_norm(k, dim=-1, dtype=wide)
    reach = k_norm.amax(1, keepdim=True) + k_norm[:, keys - length :]
    room = (abs(scale) * ROUNDING * q_norm * reach.unsqueeze(3)).flatten(2)  # (B,T,H)
    room = _by_tile(F.pad(room, (0, 0, keys - length, 0))).amax(3)
    gates = _by_tile(log_decay).sum(3, dtype=torch.float64)  # (B,H,tiles)
    after = -gates.cumsum(2).contiguous()  # grows: what the tiles up to this one forgot
    least = math.log(prune / min(keys, keys if window is None else window)) - room
    # a is dropped by b when after[b - 1] - after[a] > -least: count the a for which after[a] < after[b - 1] + least
    first = torch.searchsorted(after, (F.pad(after[:, :, :-1], (1, 0)) + least).contiguous())
    tiles = torch.arange(first.shape[2], device=q.device)
    first = torch.minimum(first, tiles).unflatten(1, (kv_heads, -1)).amin(2)
    return first.flip(-1).cummin(-1).values.flip(-1).int()


def _by_tile(x: Tensor) -> Tensor:
    """(B,N,H) to (B,H,tiles,TILE), zeros after the end."""
    x = F.pad(x.transpose(1, 2), (0, -x.shape[1] % TILE))
    return x.unflatten(2, (-1, TILE))


def pruned_spans(first: Tensor, spans: tuple[Tensor, ...] | None, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Spans (B,G,length) of the keys that `first` keeps inside `spans` (B,length), and the end of these."""
    tile = torch.arange(first.shape[2], device=first.device, dtype=torch.int32)
    last = torch.searchsorted(first, tile.expand_as(first).contiguous(), right=True, out_int32=True)
    start, end = (TILE * x.repeat_interleave(TILE, dim=2)[:, :, :length] for x in (first, last))
    end = end.clamp(max=length)
    if spans is None:
        return start, end, None
    return torch.maximum(start, spans[0].unsqueeze(1)), torch.minimum(end, spans[1].unsqueeze(1)), spans[1]
