"""Gated sliding-window attention in Triton, forward and backward, for sm_80 and later (SPEC.md 0.1, 2.2, 2.3).

Logits are in log2 units, s_tj = (scale * q_t . k_j) * log2 e + suffix_j + carry: the bias is a number per key. `carry`
sums the totals of the gate chunks between the key's tile and the query's, one scalar that grows tile by tile
(zoo/kernels/gate.py). It is off by suffix_t, constant along row t, so the softmax doesn't see it; lse takes it back.

    _forward    a query tile walks its key tiles from the newest to the oldest
    _rows       delta_t = o_t . do_t - dlse_t, and lse_t in the units above
    _dkdv       a key tile walks its query tiles, for each query head of its group; writes the key side of the gradient
                of the gate's prefix, -sum_t ds_tj
    _dq         the forward's walk again; writes the query side, sum_j ds_tj

The query side is dlse_t and nothing else in exact arithmetic. In bfloat16 it is not: delta comes from a rounded out.
Left out, what each row lacks adds up along the sequence into the gradients of log_decay (measured, window 128: 4% of
their size at 1,000 tokens, 18% at 64,000). With both sides it cancels pair by pair (0.2% at either length).

One writer per element and kernel, no atomics: the same inputs give the same bits. Switches are compile-time constants:
GATED, WINDOWED, BOUNDED (start and end bound what a token sees beside the window: documents, a row's first valid key),
PRUNED (first and last bound it too, by tiles of KEPT_TILE, for each key head).

Shapes: q, out (B,T,H,D); k, v (B,N,G,D); lse (B,T,H); suffix (B,H,N); row_lse, delta (B,H,T); start, end (B,N) int32;
first, last (B,G,tiles) int32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import KEPT_TILE
from zoo.kernels import gate as gates
from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.tiles import (
    CHUNK,
    Tile,
    Tiles,
    choose_tiles,
    is_visible,
    key_range,
    load_tile,
    query_range,
    store_tile,
    tile_is_full,
)
from zoo.kernels.units import LN2, LOG2E

ROWS = 32  # per program of the pass that reads out and dout once
INTEGERS = ["T", "N", "window", "stride_bound"]  # change from call to call: compiling for their values pays nothing


# ------------------------------------------------------------------------------------------------------- the launchers


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, ...],
    *,
    window: int | None,
    scale: float,
    spans: tuple[Tensor, Tensor] | None,
    kept: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32. gate is () for none, (log_decay,) or (z, u), each (B,N,H).

    Checked tensors on one CUDA device, or on the CPU under Triton's interpreter. spans = (start, end), (B,N) int32: the
    first visible key of each query, one past the last query that sees each key. kept = (first, last), (B,G,tiles)
    int32: the same of tiles, where some are pruned (zoo/ops/prune.py). `tiles` overrides the table.
    """
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    tile = (tiles or choose_tiles(q.device, q.dtype, dim, window)).forward
    with on_device(q):
        suffix, total = gates.prefix(gate) if gate else (None, None)
        bounds, bound_strides = _bounds(spans, kept, 0)
        _forward[_query_tiles(q, k, tile) * batch * heads,](
            q, k, v, suffix, total, *bounds, out, lse,
            *strides_of(q, k, v), *bound_strides, **_sizes(q, k, window, scale),
            **_switches(q, k, gate, window, spans, kept), **_schedule(tile),
        )  # fmt: skip
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
    spans: tuple[Tensor, Tensor] | None,
    kept: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """dq, dk, dv and the gradients of `gate`, from what the forward returned and the gradients of both."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tuple(torch.zeros_like(x) for x in gate)
    q, k, v, dout, out = (rows_contiguous(x) for x in (q, k, v, dout, out))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tiles = tiles or choose_tiles(q.device, q.dtype, dim, window)
    sizes, switches = _sizes(q, k, window, scale), _switches(q, k, gate, window, spans, kept)
    with on_device(q):
        suffix, total = gates.prefix(gate) if gate else (None, None)
        row_lse, delta = (q.new_empty((batch, heads, length), dtype=torch.float32) for _ in range(2))
        key_side = torch.empty_like(suffix) if suffix is not None else None
        query_side = torch.empty_like(delta) if suffix is not None else None
        dlse = dlse.contiguous() if dlse is not None else None
        _rows[triton.cdiv(length, ROWS) * batch * heads,](
            out, dout, lse.contiguous(), dlse, suffix, row_lse, delta, *strides_of(out, dout),
            length, k.shape[1], heads, D=dim, BLOCK_D=switches["BLOCK_D"], BLOCK_Q=ROWS, GATED=bool(gate),
            WITH_DLSE=dlse is not None,
        )  # fmt: skip
        strides = strides_of(q, k, v, dout)
        bounds, bound_strides = _bounds(spans, kept, 1)
        _dkdv[triton.cdiv(k.shape[1], tiles.dkdv.keys) * batch * kv_heads,](
            q, k, v, dout, suffix, total, *bounds, row_lse, delta, dk, dv, key_side,
            *strides, *bound_strides, **sizes, **switches, **_schedule(tiles.dkdv),
        )  # fmt: skip
        bounds, bound_strides = _bounds(spans, kept, 0)
        _dq[_query_tiles(q, k, tiles.dq) * batch * heads,](
            q, k, v, dout, suffix, total, *bounds, row_lse, delta, dq, query_side,
            *strides, *bound_strides, **sizes, **switches, **_schedule(tiles.dq),
        )  # fmt: skip
        if key_side is None or query_side is None:
            return dq, dk, dv, ()
        return dq, dk, dv, gates.prefix_backward(key_side, query_side, gate, None if spans is None else spans[1])


def _query_tiles(q: Tensor, k: Tensor, tile: Tile) -> int:
    """Query tiles per head: aligned to absolute positions, so the first one may hold rows before the first query."""
    return triton.cdiv(k.shape[1], tile.queries) - (k.shape[1] - q.shape[1]) // tile.queries


def _sizes(q: Tensor, k: Tensor, window: int | None, scale: float) -> dict[str, int | float]:
    window = k.shape[1] if window is None else min(window, k.shape[1])
    return {"T": q.shape[1], "N": k.shape[1], "H": q.shape[2], "window": window, "scale": scale}


def _switches(
    q: Tensor, k: Tensor, gate: tuple, window: int | None, spans: tuple | None, kept: tuple | None
) -> dict[str, int | bool]:
    dim = q.shape[3]
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "GATED": bool(gate),
        "WINDOWED": window is not None,
        "BOUNDED": spans is not None,
        "PRUNED": kept is not None,
        "KEPT_TILE": KEPT_TILE,
        "CHUNK": CHUNK,
    }


def _schedule(tile: Tile) -> dict[str, int]:
    return {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def _bounds(
    spans: tuple[Tensor, Tensor] | None, kept: tuple[Tensor, Tensor] | None, side: int
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]:
    """What bounds queries (side 0) or keys (1), by position and by tile; the strides of the former."""
    tiles = None if kept is None else kept[side].contiguous()
    return (None, tiles) if spans is None else (spans[side], tiles), (0, 0) if spans is None else spans[side].stride()


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _split(program, tiles, H):
    """(tile, batch, head) of a program; the tile varies fastest. 64-bit where they multiply strides."""
    row = program // tiles
    return program % tiles, tl.cast(row // H, tl.int64), tl.cast(row % H, tl.int64)


@triton.jit
def _query_tile(program, offset, N, H, BLOCK_Q: tl.constexpr):
    """(first row, batch, head) of a program over query tiles, the latest rows first: with no window they cost most."""
    first = offset // BLOCK_Q
    tile, batch, head = _split(program, tl.cdiv(N, BLOCK_Q) - first, H)
    return (tl.cdiv(N, BLOCK_Q) - 1 - tile) * BLOCK_Q, batch, head


@triton.jit
def _newer_total(total_ptr, position, moved, CHUNK: tl.constexpr):
    """What `carry` grows by when a walk crosses `position`: the total of the chunk that begins there, else 0."""
    return tl.load(total_ptr + position // CHUNK, mask=moved & (position % CHUNK == 0), other=0.0)


@triton.jit
def _kept(tiles_ptr, batch, kv_head, position, N, kv_heads, KEPT_TILE: tl.constexpr):
    """Where positions of a tile that is kept begin or end, for each `position` < N."""
    tiles_ptr += (batch * kv_heads + kv_head) * tl.cdiv(N, KEPT_TILE)
    return tl.load(tiles_ptr + position // KEPT_TILE, mask=position < N, other=0) * KEPT_TILE


@triton.jit
def _starts(
    start_ptr, first_tile_ptr, q0, batch, kv_head, offset, N, kv_heads, stride_bound, stride_start,
    BLOCK_Q: tl.constexpr, BOUNDED: tl.constexpr, PRUNED: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """The first key that each query of a tile may see beside the window; that of its first query, and of its last."""
    row = q0 + tl.arange(0, BLOCK_Q)
    start, oldest, latest = row, 0, 0
    first, last = max(q0, offset), min(q0 + BLOCK_Q, N) - 1
    if BOUNDED:
        start_ptr += batch * stride_bound
        start = tl.load(start_ptr + row * stride_start, mask=row < N, other=0)
        oldest = tl.load(start_ptr + first * stride_start)
        latest = tl.load(start_ptr + last * stride_start)
    if PRUNED:
        kept = _kept(first_tile_ptr, batch, kv_head, row, N, kv_heads, KEPT_TILE)
        start = tl.maximum(start, kept) if BOUNDED else kept
        oldest = max(oldest, _kept(first_tile_ptr, batch, kv_head, first, N, kv_heads, KEPT_TILE))
        latest = max(latest, _kept(first_tile_ptr, batch, kv_head, last, N, kv_heads, KEPT_TILE))
    return start, oldest, latest


@triton.jit
def _ends(
    end_ptr, last_tile_ptr, k0, batch, kv_head, N, kv_heads, stride_bound, stride_end,
    BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr, PRUNED: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """One past the last query that may see each key of a tile beside the window; its last key's, and its first's."""
    column = k0 + tl.arange(0, BLOCK_K)
    end, beyond, earliest = column, N, N
    newest = min(k0 + BLOCK_K, N) - 1
    if BOUNDED:
        end_ptr += batch * stride_bound
        end = tl.load(end_ptr + column * stride_end, mask=column < N, other=0)
        beyond = tl.load(end_ptr + newest * stride_end)
        earliest = tl.load(end_ptr + k0 * stride_end)
    if PRUNED:
        kept = _kept(last_tile_ptr, batch, kv_head, column, N, kv_heads, KEPT_TILE)
        end = tl.minimum(end, kept) if BOUNDED else kept
        beyond = min(beyond, _kept(last_tile_ptr, batch, kv_head, newest, N, kv_heads, KEPT_TILE))
        earliest = min(earliest, _kept(last_tile_ptr, batch, kv_head, k0, N, kv_heads, KEPT_TILE))
    return end, beyond, earliest


@triton.jit
def _row_visible(row, column, start, window, WINDOWED: tl.constexpr, STARTS: tl.constexpr):
    """The mask of a query tile's pair, (rows, columns)."""
    visible = is_visible(row[:, None], column[None, :], window, WINDOWED)
    if STARTS:
        visible = visible & (column[None, :] >= start[:, None])
    return visible


@triton.jit(do_not_specialize=INTEGERS)
def _forward(
    q_ptr, k_ptr, v_ptr, suffix_ptr, total_ptr, start_ptr, first_tile_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bound, stride_start, T, N, H, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
    PRUNED: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: online softmax over its key tiles."""
    offset = N - T
    q0, batch, head = _query_tile(tl.program_id(0), offset, N, H, BLOCK_Q)
    row = q0 + tl.arange(0, BLOCK_Q)
    inside = (row >= offset) & (row < N)
    q_ptr += batch * stride_qb + head * stride_qh - tl.cast(offset, tl.int64) * stride_qt
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh
    if GATED:
        suffix_ptr += (batch * H + head) * N
        total_ptr += (batch * H + head) * tl.cdiv(N, CHUNK)
    start, oldest, latest_start = _starts(
        start_ptr, first_tile_ptr, q0, batch, head // GROUP, offset, N, H // GROUP, stride_bound, stride_start,
        BLOCK_Q, BOUNDED, PRUNED, KEPT_TILE,
    )  # fmt: skip

    q = load_tile(q_ptr, q0, offset, N, stride_qt, BLOCK_Q, D, BLOCK_D)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    carry = 0.0
    newest, count = key_range(q0, offset, N, window, oldest, BLOCK_Q, BLOCK_K, WINDOWED)
    for i in range(0, count):
        k0 = newest - i * BLOCK_K
        column = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, k0, 0, N, stride_kt, BLOCK_K, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if GATED:
            carry += _newer_total(total_ptr, k0 + BLOCK_K, i > 0, CHUNK)
            s += (tl.load(suffix_ptr + column, mask=column < N, other=0.0) + carry)[None, :]
        full = tile_is_full(q0, k0, window, BLOCK_Q, BLOCK_K, WINDOWED) & (k0 >= latest_start)
        if not full:
            s = tl.where(_row_visible(row, column, start, window, WINDOWED, BOUNDED or PRUNED), s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet: p = 0, not NaN
        p = tl.exp2(s - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, k0, 0, N, stride_vt, BLOCK_K, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    seen = total > 0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
    if GATED:
        lse -= tl.load(suffix_ptr + row, mask=row < N, other=0.0)
    out = acc / tl.where(seen, total, 1.0)[:, None]
    out_ptr += (batch * T - offset) * H * D + head * D
    store_tile(out_ptr, out, q0, offset, N, H * D, BLOCK_Q, D, BLOCK_D)
    lse_ptr += (batch * T - offset) * H + head
    tl.store(lse_ptr + tl.cast(row, tl.int64) * H, lse * LN2, mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _rows(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, suffix_ptr, row_lse_ptr, delta_ptr,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, T, N, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, GATED: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """Two numbers per row for the backward kernels. A row that saw no key gets lse = inf, hence p = 0."""
    tile, batch, head = _split(tl.program_id(0), tl.cdiv(T, BLOCK_Q), H)
    t0 = tile * BLOCK_Q
    row = t0 + tl.arange(0, BLOCK_Q)
    inside = row < T
    out = load_tile(out_ptr + batch * stride_ob + head * stride_oh, t0, 0, T, stride_ot, BLOCK_Q, D, BLOCK_D)
    dout = load_tile(dout_ptr + batch * stride_db + head * stride_dh, t0, 0, T, stride_dt, BLOCK_Q, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    by_token = (batch * T + row) * H + head
    by_head = (batch * H + head) * T + row
    lse = tl.load(lse_ptr + by_token, mask=inside, other=0.0)
    seen = lse > -float("inf")
    if WITH_DLSE:
        delta -= tl.where(seen, tl.load(dlse_ptr + by_token, mask=inside, other=0.0), 0.0)
    row_lse = lse * LOG2E
    if GATED:
        row_lse += tl.load(suffix_ptr + (batch * H + head) * N + (N - T) + row, mask=inside, other=0.0)
    tl.store(row_lse_ptr + by_head, tl.where(seen, row_lse, float("inf")), mask=inside)
    tl.store(delta_ptr + by_head, delta, mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, suffix_ptr, total_ptr, end_ptr, last_tile_ptr, row_lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, key_side_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_bound, stride_end, T, N, H, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
    PRUNED: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """One key tile of one key/value head. Matrices are held transposed, (keys, queries)."""
    offset = N - T
    kv_heads = H // GROUP
    tile, batch, kv_head = _split(tl.program_id(0), tl.cdiv(N, BLOCK_K), kv_heads)
    k0 = tile * BLOCK_K
    column = k0 + tl.arange(0, BLOCK_K)
    end, beyond, earliest_end = _ends(
        end_ptr, last_tile_ptr, k0, batch, kv_head, N, kv_heads, stride_bound, stride_end,
        BLOCK_K, BOUNDED, PRUNED, KEPT_TILE,
    )  # fmt: skip

    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, k0, 0, N, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, k0, 0, N, stride_vt, BLOCK_K, D, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    oldest, count = query_range(k0, offset, N, window, beyond, BLOCK_Q, BLOCK_K, WINDOWED)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        head_row = batch * H + head
        q_base = q_ptr + batch * stride_qb + head * stride_qh - tl.cast(offset, tl.int64) * stride_qt
        dout_base = dout_ptr + batch * stride_db + head * stride_dh - tl.cast(offset, tl.int64) * stride_dt
        row_at = head_row * T - offset
        ds_sum = tl.zeros([BLOCK_K], tl.float32)
        carry = 0.0
        if GATED:
            suffix = tl.load(suffix_ptr + head_row * N + column, mask=column < N, other=0.0)
            total_base = total_ptr + head_row * tl.cdiv(N, CHUNK)
            if count > 0:
                for chunk in range(k0 // CHUNK + 1, oldest // CHUNK + 1):  # the queries may begin chunks later
                    carry += tl.load(total_base + chunk)
        for i in range(0, count):
            q0 = oldest + i * BLOCK_Q
            row = q0 + tl.arange(0, BLOCK_Q)
            inside = (row >= offset) & (row < N)
            q = load_tile(q_base, q0, offset, N, stride_qt, BLOCK_Q, D, BLOCK_D)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            if GATED:
                carry += _newer_total(total_base, q0, i > 0, CHUNK)
                s += (suffix + carry)[:, None]
            row_lse = tl.load(row_lse_ptr + row_at + row, mask=inside, other=float("inf"))
            p = tl.exp2(s - row_lse[None, :])
            full = tile_is_full(q0, k0, window, BLOCK_Q, BLOCK_K, WINDOWED) & (q0 + BLOCK_Q <= earliest_end)
            if not full:
                visible = is_visible(row[None, :], column[:, None], window, WINDOWED)
                if BOUNDED or PRUNED:
                    visible = visible & (row[None, :] < end[:, None])
                p = tl.where(visible, p, 0.0)
            dout = load_tile(dout_base, q0, offset, N, stride_dt, BLOCK_Q, D, BLOCK_D)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            delta = tl.load(delta_ptr + row_at + row, mask=inside, other=0.0)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            if GATED:
                ds_sum += tl.sum(ds, 1)
        if GATED:
            tl.store(key_side_ptr + head_row * N + column, -ds_sum, mask=column < N)

    corner = batch * N * kv_heads * D + kv_head * D
    store_tile(dk_ptr + corner, dk * scale, k0, 0, N, kv_heads * D, BLOCK_K, D, BLOCK_D)
    store_tile(dv_ptr + corner, dv, k0, 0, N, kv_heads * D, BLOCK_K, D, BLOCK_D)


@triton.jit(do_not_specialize=INTEGERS)
def _dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, suffix_ptr, total_ptr, start_ptr, first_tile_ptr, row_lse_ptr, delta_ptr, dq_ptr,
    query_side_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_bound, stride_start, T, N, H, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
    PRUNED: tl.constexpr, KEPT_TILE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head, the same walk as the forward's."""
    offset = N - T
    q0, batch, head = _query_tile(tl.program_id(0), offset, N, H, BLOCK_Q)
    row = q0 + tl.arange(0, BLOCK_Q)
    inside = (row >= offset) & (row < N)
    q_ptr += batch * stride_qb + head * stride_qh - tl.cast(offset, tl.int64) * stride_qt
    dout_ptr += batch * stride_db + head * stride_dh - tl.cast(offset, tl.int64) * stride_dt
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh
    row_at = (batch * H + head) * T - offset
    if GATED:
        suffix_ptr += (batch * H + head) * N
        total_ptr += (batch * H + head) * tl.cdiv(N, CHUNK)
    start, oldest, latest_start = _starts(
        start_ptr, first_tile_ptr, q0, batch, head // GROUP, offset, N, H // GROUP, stride_bound, stride_start,
        BLOCK_Q, BOUNDED, PRUNED, KEPT_TILE,
    )  # fmt: skip

    q = load_tile(q_ptr, q0, offset, N, stride_qt, BLOCK_Q, D, BLOCK_D)
    dout = load_tile(dout_ptr, q0, offset, N, stride_dt, BLOCK_Q, D, BLOCK_D)
    row_lse = tl.load(row_lse_ptr + row_at + row, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row_at + row, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    ds_sum = tl.zeros([BLOCK_Q], tl.float32)
    carry = 0.0
    newest, count = key_range(q0, offset, N, window, oldest, BLOCK_Q, BLOCK_K, WINDOWED)
    for i in range(0, count):
        k0 = newest - i * BLOCK_K
        column = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, k0, 0, N, stride_kt, BLOCK_K, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if GATED:
            carry += _newer_total(total_ptr, k0 + BLOCK_K, i > 0, CHUNK)
            s += (tl.load(suffix_ptr + column, mask=column < N, other=0.0) + carry)[None, :]
        p = tl.exp2(s - row_lse[:, None])
        full = tile_is_full(q0, k0, window, BLOCK_Q, BLOCK_K, WINDOWED) & (k0 >= latest_start)
        if not full:
            p = tl.where(_row_visible(row, column, start, window, WINDOWED, BOUNDED or PRUNED), p, 0.0)
        v = load_tile(v_ptr, k0, 0, N, stride_vt, BLOCK_K, D, BLOCK_D)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if GATED:
            ds_sum += tl.sum(ds, 1)

    if GATED:
        tl.store(query_side_ptr + row_at + row, ds_sum, mask=inside)
    dq_ptr += (batch * T - offset) * H * D + head * D
    store_tile(dq_ptr, dq * scale, q0, offset, N, H * D, BLOCK_Q, D, BLOCK_D)
