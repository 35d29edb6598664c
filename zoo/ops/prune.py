"""Which key tiles a gate has made negligible (opt in; after adaptive pruning, Lin et al., arXiv 2504.06949).

Logits are s_tj = scale q_t.k_j + sum_{i=j+1..t} g_i with g = log_decay <= 0. Tiles are KEPT_TILE positions. For each
head let K = max_j |k_j|, C(a, b) the sum of g over the tiles strictly between a and b, n the number of keys that a
query may see, and for a query tile b

    room_b = |scale| (K max_{t in b} |q_t| + max_{t in b} |q_t| |k_t|).

Key tile a is dropped for query tile b, with every tile before it, when   C(a, b) + room_b < log(prune / n).

Theorem. A row loses at most delta <= prune of its probability. With V = max |v_j| then
    |out' - out| <= 2 delta V,      0 <= lse - lse' <= -log(1 - delta),
    and for each row sum_j |dS'_tj - dS_tj| <= 6 delta |dout_t| V  (dS: gradient of out's loss in the logits).
Proof. A query t sees itself, so lse_t >= s_tt >= -|scale| |q_t| |k_t|. For a dropped key, s_tj <= |scale| |q_t| K +
C(a, b): the gates between j and t include those of all tiles between theirs, and none is positive. Hence p_tj <=
exp(|scale| |q_t| (K + |k_t|) + C) <= exp(room_b + C) < prune / n, and fewer than n keys are dropped. What is kept is
rescaled by 1 / (1 - delta), so sum_j |p'_tj - p_tj| = 2 delta, which bounds out; dS_tj = p_tj (dout_t.(v_j - out_t))
differs by |p' - p| |dout| 2V and by p |dout| |out' - out|, in sum 4 delta + 2 delta times |dout| V.

Rounding. What a tile forgot becomes a whole number of UNITS of a nat, rounded down and cut at FORGOTTEN nats; what a
query tile needs, room_b - log(prune / n), is enlarged by ROUNDING, which covers that of the norms and of a tile's own
sum (float32 at least), and rounded up. From there on integers are compared: rounding only ever keeps a tile more.

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

import torch
from torch import Tensor

from zoo.kernels import KEPT_TILE
from zoo.ops import backend
from zoo.ops.stacking import stack_rows


@torch.no_grad()
def kept_tiles(
    q: Tensor, k: Tensor, gate: tuple[Tensor, ...], *, window: int | None, scale: float, prune: float
) -> tuple[Tensor, Tensor]:
    """(first, last), each (B,G,tiles) int32: the first key tile that each tile of queries keeps, and one past the last
    tile of queries that keeps each key tile. Neither ever falls along the tiles.

    q (B,T,H,D), k (B,N,G,D), the queries being the last T positions; gate is (log_decay,) or (z, u), each (B,N,H).
    Reads q and k once, nothing on the host.
    """
    first, last = _kept_tiles(q, k, *gate[:1], *gate[1:] or (None,), window, scale, prune)
    return first, last


# One operator, so that torch.compile does not look into the choice of a back end
@torch.library.custom_op("zoo::kept_tiles", mutates_args=())
def _kept_tiles(
    q: Tensor, k: Tensor, gate: Tensor, u: Tensor | None, window: int | None, scale: float, prune: float
) -> tuple[Tensor, Tensor]:
    module = backend.choose("prune", q.device, q.dtype, q.shape[3])
    gates = (gate,) if u is None else (gate, u)
    with torch.autocast(q.device.type, enabled=False):
        return module.kept_tiles(q, k, gates, window=window, scale=scale, prune=prune)


@_kept_tiles.register_fake
def _(q, k, gate, u, window, scale, prune):
    shape = (k.shape[0], k.shape[2], (k.shape[1] + KEPT_TILE - 1) // KEPT_TILE)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


stack_rows(_kept_tiles)
