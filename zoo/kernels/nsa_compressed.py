"""Attention over compressed blocks, forward and backward (zoo/kernels/nsa.py).

    _forward    rows of one group walk the compressed keys they see: online softmax
    _dq         the forward's walk again
    _dkdv       a tile of compressed keys and a share of the rows that see it; the shares are added in order

A row is a (token, query head) pair of one key/value head: row r of R = H/G is token r // R, member r % R. It sees the
slots [low, high) of the compressed keys: low where its document's blocks begin, high by how many are complete.

Shapes: q, out (B,T,H,D); k, v (B,M,G,D); lse, row_lse, delta (B,T,H); place, first_block (B,T) int32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.tiles import architecture, load_tile, store_tile
from zoo.kernels.units import LN2, LOG2E

DELTA_ROWS = 32
PROGRAMS = 528  # of _dkdv at least, where the keys alone make fewer: four for each multiprocessor of a Hopper card
INTEGERS = ["T", "M", "rows_each", "items", "chunks"]
# (rows, slots, warps, stages) by bytes of a head's row in units of two; float32 reads the row of twice its head_dim
SM90 = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2), 512: (16, 16, 4, 1)},
    "choose": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (16, 16, 4, 1)},
    "dq": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2), 512: (16, 16, 4, 1)},
    "dkdv": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2), 512: (16, 16, 4, 1)},
}
OTHER = {
    "forward": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 4, 1), 512: (16, 16, 4, 1)},
    "choose": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
    "dq": {64: (64, 64, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
    "dkdv": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
}
# decoding: one program walks all slots of a row and head, so what counts is how few steps that takes
STEP_ROWS = 16
STEP = {
    "forward": {64: (16, 128, 4, 1), 128: (16, 128, 4, 1), 256: (16, 64, 4, 1), 512: (16, 16, 4, 1)},
    "choose": {64: (16, 256, 4, 1), 128: (16, 256, 4, 1), 256: (16, 64, 4, 1), 512: (16, 16, 4, 1)},
}


def choose_tile(kernel: str, q: Tensor, rows: int) -> tuple[int, int, int, int]:
    """rows: (token, query head) pairs of one key/value head."""
    width = max(64, triton.next_power_of_2(q.shape[3]) * q.dtype.itemsize // 2)
    if rows <= STEP_ROWS and kernel in STEP:
        return STEP[kernel][width]
    table = SM90 if architecture(q.device) == "sm90" else OTHER
    return table[kernel][width]


# ------------------------------------------------------------------------------------------------------- the launchers


def attend(q: Tensor, k: Tensor, v: Tensor, places: Any, geometry: Any, scale: float) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    group_rows = length * heads // kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    with on_device(q):
        rows, slots, warps, stages = choose_tile("forward", q, group_rows)
        _forward[triton.cdiv(group_rows, rows) * batch * kv_heads,](
            q, k, v, places.place, places.first_block, out, lse, *strides_of(q, k, v),
            **sizes_of(q, k, scale), **switches_of(q, k, geometry), BLOCK_R=rows, BLOCK_K=slots,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def compressed_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Any,
    geometry: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    batch, length, heads, dim = q.shape
    blocks, kv_heads = k.shape[1], k.shape[2]
    if q.numel() == 0 or blocks == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v, dout, out = (rows_contiguous(x) for x in (q, k, v, dout, out))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes, switches = sizes_of(q, k, scale), switches_of(q, k, geometry)
    group_rows = length * heads // kv_heads
    strides = strides_of(q, k, v, dout)
    with on_device(q):
        row_lse, delta = row_numbers(dout, dlse, out, lse)
        rows, slots, warps, stages = choose_tile("dq", q, group_rows)
        _dq[triton.cdiv(group_rows, rows) * batch * kv_heads,](
            q, k, v, dout, row_lse, delta, places.place, places.first_block, dq, *strides,
            **sizes, **switches, BLOCK_R=rows, BLOCK_K=slots, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        rows, slots, warps, stages = choose_tile("dkdv", q, group_rows)
        tiles = triton.cdiv(blocks, slots)
        shares = max(1, min(triton.cdiv(group_rows, rows), triton.cdiv(PROGRAMS, tiles * batch * kv_heads)))
        begin, end = seen_by(places, geometry, tiles, slots)
        dk, dv = (q.new_empty((shares, *k.shape), dtype=torch.float32) for _ in range(2))
        _dkdv[tiles * batch * kv_heads, shares](
            q, k, v, dout, row_lse, delta, places.place, places.first_block, begin, end, dk, dv, *strides,
            triton.cdiv(triton.cdiv(group_rows, shares), rows) * rows,
            **sizes, **switches, BLOCK_R=rows, BLOCK_K=slots, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def row_numbers(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """lse in log2 units, +inf for a row that saw nothing (hence p = 0), and delta = out . dout - dlse; (B,T,H)."""
    batch, length, heads, dim = out.shape
    row_lse, delta = (out.new_empty((batch, length, heads), dtype=torch.float32) for _ in range(2))
    _row_numbers[triton.cdiv(batch * length * heads, DELTA_ROWS),](
        out, dout, lse.contiguous(), None if dlse is None else dlse.contiguous(), row_lse, delta,
        *strides_of(out, dout), batch * length * heads, length, heads, D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_R=DELTA_ROWS, WITH_DLSE=dlse is not None,
    )  # fmt: skip
    return row_lse, delta


def seen_by(places: Any, geometry: Any, tiles: int, slots: int, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """First token that sees each tile of slots, and one past the last; (B, tiles) int32. Both bounds never fall.
    whole: those that see all of it."""
    low = places.first_block * geometry.ratio
    high = low + geometry.visible(places.place)
    first = torch.arange(tiles, device=low.device, dtype=torch.int32).mul_(slots).expand(low.shape[0], -1).contiguous()
    last = first + (slots - 1)
    newest, oldest = (last, first) if whole else (first, last)
    begin = torch.searchsorted(high.contiguous(), newest, right=True, out_int32=True)
    return begin, torch.searchsorted(low.contiguous(), oldest, right=True, out_int32=True)


def sizes_of(q: Tensor, k: Tensor, scale: float) -> dict[str, int | float]:
    return {"T": q.shape[1], "M": k.shape[1], "G": k.shape[2], "scale": scale}


def switches_of(q: Tensor, k: Tensor, geometry: Any) -> dict[str, int]:
    dim = q.shape[3]
    return {
        "GROUP": q.shape[2] // k.shape[2], "D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK": geometry.block, "STRIDE": geometry.stride, "RATIO": geometry.ratio,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def load_rows(base, token, member, stride_t, stride_h, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of x[token, member], zero where not inside. `base` points at the group's first head."""
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    at = tl.cast(token, tl.int64) * stride_t + member * stride_h
    return tl.load(base + at[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, tile, token, member, stride_t, stride_h, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`."""
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    at = tl.cast(token, tl.int64) * stride_t + member * stride_h
    tl.store(base + at[:, None] + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _bounds(
    place_ptr, first_ptr, token, inside, M, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr
):  # fmt: skip
    """[low, high): the slots that tokens see."""
    place = tl.load(place_ptr + token, mask=inside, other=0)
    low = tl.load(first_ptr + token, mask=inside, other=0) * RATIO
    seen = tl.where(place + 1 >= BLOCK, (place + 1 - BLOCK) // STRIDE + 1, 0)
    return low, tl.minimum(low + seen, M)


@triton.jit
def _walk(
    place_ptr, first_ptr, r0, T, M,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(first slot, tiles, latest low, earliest high) of a tile of rows; the bounds never fall from token to token."""
    first_low, first_high = _bounds(place_ptr, first_ptr, r0 // GROUP, True, M, BLOCK, STRIDE, RATIO)
    last = min((r0 + BLOCK_R - 1) // GROUP, T - 1)
    last_low, last_high = _bounds(place_ptr, first_ptr, last, True, M, BLOCK, STRIDE, RATIO)
    begin = first_low // BLOCK_K * BLOCK_K
    return begin, tl.cdiv(max(last_high - begin, 0), BLOCK_K), last_low, first_high


@triton.jit
def program(number, tiles, G):
    """(tile, batch, kv head); the latest rows first, they see most. 64-bit where they multiply strides."""
    other = number // tiles
    return tiles - 1 - number % tiles, tl.cast(other // G, tl.int64), tl.cast(other % G, tl.int64)


@triton.jit(do_not_specialize=INTEGERS)
def _forward(
    q_ptr, k_ptr, v_ptr, place_ptr, first_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    T, M, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, batch, kv_head = program(tl.program_id(0), tl.cdiv(T * GROUP, BLOCK_R), G)
    r0 = tile * BLOCK_R
    row = r0 + tl.arange(0, BLOCK_R)
    token, member, inside = row // GROUP, row % GROUP, row < T * GROUP
    place_ptr += batch * T
    first_ptr += batch * T
    low, high = _bounds(place_ptr, first_ptr, token, inside, M, BLOCK, STRIDE, RATIO)
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    begin, count, last_low, first_high = _walk(
        place_ptr, first_ptr, r0, T, M, GROUP, BLOCK, STRIDE, RATIO, BLOCK_R, BLOCK_K
    )
    for i in range(0, count):
        k0 = begin + i * BLOCK_K
        slot = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, k0, 0, M, stride_kt, BLOCK_K, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if (k0 < last_low) | (k0 + BLOCK_K > first_high):
            visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            s = tl.where(visible, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, k0, 0, M, stride_vt, BLOCK_K, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    seen = total > 0
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
    out = acc / tl.where(seen, total, 1.0)[:, None]
    heads = G * GROUP
    out_ptr += batch * T * heads * D + kv_head * GROUP * D
    store_rows(out_ptr, out, token, member, heads * D, D, inside, D, BLOCK_D)
    at = (batch * T + token) * heads + kv_head * GROUP + member
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit
def _row_numbers(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, row_lse_ptr, delta_ptr,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, rows, T, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    head, token, batch = row % H, row // H % T, row // H // T
    other = batch * stride_ob + head * stride_oh
    out = load_rows(out_ptr, token, other, stride_ot, 1, inside, D, BLOCK_D)
    other = batch * stride_db + head * stride_dh
    dout = load_rows(dout_ptr, token, other, stride_dt, 1, inside, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    seen = lse > -float("inf")
    if WITH_DLSE:
        delta -= tl.where(seen, tl.load(dlse_ptr + row, mask=inside, other=0.0), 0.0)
    tl.store(row_lse_ptr + row, tl.where(seen, lse * LOG2E, float("inf")), mask=inside)
    tl.store(delta_ptr + row, delta, mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, place_ptr, first_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, T, M, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, batch, kv_head = program(tl.program_id(0), tl.cdiv(T * GROUP, BLOCK_R), G)
    r0 = tile * BLOCK_R
    row = r0 + tl.arange(0, BLOCK_R)
    token, member, inside = row // GROUP, row % GROUP, row < T * GROUP
    place_ptr += batch * T
    first_ptr += batch * T
    low, high = _bounds(place_ptr, first_ptr, token, inside, M, BLOCK, STRIDE, RATIO)
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    dout_ptr += batch * stride_db + kv_head * GROUP * stride_dh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    heads = G * GROUP
    at = (batch * T + token) * heads + kv_head * GROUP + member

    q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
    dout = load_rows(dout_ptr, token, member, stride_dt, stride_dh, inside, D, BLOCK_D)
    row_lse = tl.load(row_lse_ptr + at, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    begin, count, last_low, first_high = _walk(
        place_ptr, first_ptr, r0, T, M, GROUP, BLOCK, STRIDE, RATIO, BLOCK_R, BLOCK_K
    )
    for i in range(0, count):
        k0 = begin + i * BLOCK_K
        slot = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, k0, 0, M, stride_kt, BLOCK_K, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        p = tl.exp2(s - row_lse[:, None])
        if (k0 < last_low) | (k0 + BLOCK_K > first_high):
            visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            p = tl.where(visible, p, 0.0)
        v = load_tile(v_ptr, k0, 0, M, stride_vt, BLOCK_K, D, BLOCK_D)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_ptr += batch * T * heads * D + kv_head * GROUP * D
    store_rows(dq_ptr, dq * scale, token, member, heads * D, D, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=INTEGERS)
def _dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, place_ptr, first_ptr, begin_ptr, end_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, rows_each, T, M, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of slots and rows [share * rows_each, (share + 1) * rows_each): a partial sum. Matrices are held
    transposed, (slots, rows)."""
    tiles = tl.cdiv(M, BLOCK_K)
    tile, batch, kv_head = program(tl.program_id(0), tiles, G)
    share = tl.program_id(1)
    k0 = tile * BLOCK_K
    slot = k0 + tl.arange(0, BLOCK_K)
    place_ptr += batch * T
    first_ptr += batch * T
    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, k0, 0, M, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, k0, 0, M, stride_vt, BLOCK_K, D, BLOCK_D)
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    dout_ptr += batch * stride_db + kv_head * GROUP * stride_dh
    heads = G * GROUP
    numbers = batch * T * heads + kv_head * GROUP
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin = max(share * rows_each, tl.load(begin_ptr + batch * tiles + tile) * GROUP // BLOCK_R * BLOCK_R)
    end = min((share + 1) * rows_each, tl.load(end_ptr + batch * tiles + tile) * GROUP)
    for r0 in range(begin, end, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        token, member, inside = row // GROUP, row % GROUP, row < end
        q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        at = numbers + tl.cast(token, tl.int64) * heads + member
        row_lse = tl.load(row_lse_ptr + at, mask=inside, other=float("inf"))
        low, high = _bounds(place_ptr, first_ptr, token, inside, M, BLOCK, STRIDE, RATIO)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p = tl.exp2(s - row_lse[None, :])
        p = tl.where((slot[:, None] >= low[None, :]) & (slot[:, None] < high[None, :]), p, 0.0)
        dout = load_rows(dout_ptr, token, member, stride_dt, stride_dh, inside, D, BLOCK_D)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    corner = ((share * tl.num_programs(0) // (tiles * G) + batch) * M * G + kv_head) * D
    store_tile(dk_ptr + corner, dk * scale, k0, 0, M, G * D, BLOCK_K, D, BLOCK_D)
    store_tile(dv_ptr + corner, dv, k0, 0, M, G * D, BLOCK_K, D, BLOCK_D)
