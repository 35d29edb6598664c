"""The calls that every back end is held to: lengths, windows, heads, documents and starts that meet every edge."""

import math

import torch
from torch import Tensor

from tests.ops.definition import Case

# Few tokens, for the loops' sake. The interpreter's tiles are 16 and 32, the reference's blocks are cut down to 16.
CASES = [
    Case("one_token", 1, 4),
    Case("one_token_no_window_fused", 1, None, "fused"),
    Case("window_1", 37, 1),
    Case("window_2_fused", 45, 2, "fused", batch=2),
    Case("window_below_tile", 61, 7, heads=4, kv_heads=2),
    Case("window_tile_minus_1", 67, 15),
    Case("window_at_tile", 65, 16, batch=2, kv_heads=2),
    Case("window_tile_plus_1", 63, 17, "fused"),
    Case("window_above_tiles", 70, 50, dim=12),
    Case("window_at_length", 40, 40, "none"),
    Case("window_above_length", 33, 1000, "fused"),
    Case("no_window", 49, None, heads=3),
    Case("no_window_no_gate", 50, None, "none", batch=2, kv_heads=2),
    Case("window_no_gate_groups", 48, 10, "none", heads=6, kv_heads=2),
    Case("dim_20", 35, 9, dim=20),
    Case("two_gate_chunks", 140, 12, heads=1),
    Case("three_gate_chunks", 40, 140, keys=270, heads=1, dim=4),
    Case("later_queries", 21, 12, keys=70),
    Case("later_queries_other_chunk", 9, 150, "fused", keys=200, heads=1),
    Case("later_queries_no_window", 5, None, keys=140, heads=1),
    Case("one_late_query", 1, 30, keys=77),
    Case("documents", 70, 11, cu_seqlens=(0, 0, 1, 20, 20, 52, 53, 70), kv_heads=2),
    Case("documents_fused_no_window", 60, None, "fused", cu_seqlens=(0, 31, 31, 32, 60, 60)),
    Case("documents_of_one", 19, 5, cu_seqlens=tuple(range(20))),
    Case("documents_no_gate", 66, 25, "none", cu_seqlens=(0, 40, 66)),
    Case("key_start", 41, 13, key_start=(0, 30), batch=2),
    Case("key_start_later_queries", 10, 16, "fused", keys=64, key_start=(50, 58), batch=2),
    Case("key_start_no_window", 35, None, key_start=(20,)),
    Case("key_start_nothing_visible", 20, 8, keys=24, key_start=(24, 3), batch=2),
]

TILE = 64  # keys of a step in the Hopper kernels


def outgrowing(case: Case) -> dict[str, Tensor]:
    """`case.tensors()` with logits along an axis: keys of even tiles lie on one side, of odd tiles on the other.

    Every tenth row leans the first way by 40, 60 or 130 nats between the two, and 60 or 130 in a third of the tiles and
    heads alone: there a row of an odd tile has its largest logits far behind its newest tile.
    """
    tensors = case.tensors()
    batch, length, heads, dim = tensors["q"].shape
    generator = torch.Generator().manual_seed(case.seed + 1)
    side = 1 - 2 * (torch.arange(length) // TILE % 2)
    tensors["k"][..., 0] = 4 * side[None, :, None]
    nats = torch.tensor([40.0, 60, 130])[torch.randint(3, (batch, length, heads), generator=generator)]
    far = torch.rand(batch, -(-length // TILE), heads, generator=generator) < 1 / 3
    far = far.repeat_interleave(TILE, dim=1)[:, :length]
    leans = torch.rand(batch, length, heads, generator=generator) < 0.1
    tensors["q"][..., 0] = torch.where(leans & (far | (nats == 40)), nats * dim**0.5 / 8, 0)
    tensors["log_decay"] /= 50
    return tensors


def beyond_newest_tile(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """(T,H): nats from the largest logit of a row's newest tile to the row's log-sum-exp, in float64; B = 1."""
    q, k, gates = (tensors[name][0].double() for name in ("q", "k", "log_decay"))
    token = torch.arange(len(q), device=q.device)
    near = token[:, None] - token
    start = torch.zeros_like(token)
    for first in case.cu_seqlens or ():
        start = torch.where(token >= first, first, start)
    seen = (near >= 0) & (near < case.window) & (token >= start[:, None])
    own = token[:, None] // TILE == token // TILE
    rows = []
    for h in range(case.heads):
        prefix = gates[:, h].cumsum(0)
        logits = q[:, h] @ k[:, h // (case.heads // case.kv_heads)].T * case.dim**-0.5 + prefix[:, None] - prefix
        logits = logits.masked_fill(~seen, -torch.inf)
        rows.append(logits.logsumexp(1) - logits.masked_fill(~own, -torch.inf).amax(1))
    return torch.stack(rows, 1)


def poison_new_tensors(monkeypatch):
    """From here on a new float tensor holds NaN, one of integers places far outside: what isn't written shows."""

    def poisoned(create):
        def wrapper(*args, **kwargs):
            x = create(*args, **kwargs)
            if x.dtype == torch.bool:
                return x
            return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 3)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
