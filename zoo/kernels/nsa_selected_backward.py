"""Attention over the blocks that each query chose, block by block: the backward pass (zoo/kernels/nsa.py).

    _grads      an item's part of dK and dV, and each query's part of dQ
    _sum_items  the parts of dK and dV of a block's items, in order
    _sum_pairs  the parts of dQ of a query

Items and scratch are those of the forward pass (nsa_selected.py), of all blocks, the near ones among them.

Shapes: q, dout (B,T,H,D); k, v (B,N,G,D); block_index (B,T,G,top); row_lse, delta (B,T,H).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.nsa_compressed import load_rows, row_numbers, store_rows
from zoo.kernels.nsa_inverse import inverse, item_of
from zoo.kernels.nsa_piece import pieces
from zoo.kernels.nsa_selected import (
    INTEGERS,
    choose_tile,
    pairs_of,
    rows_of_heads,
    scratch_rows,
    store_scratch,
    summed_rows,
)
from zoo.kernels.tiles import load_tile
from zoo.kernels.units import LOG2E


def selected_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_index: Tensor,
    places: Any,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    dim = q.shape[3]
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v, dout, out = (rows_contiguous(x) for x in (q, k, v, dout, out))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    rows, warps, stages = choose_tile("grads", q)
    with on_device(q):
        row_lse, delta = row_numbers(dout, dlse, out, lse)
        for piece in pieces(q, k, block_index, places, block):
            part_q, part_k, part_v, part_dout = piece.queries(q), piece.keys(k), piece.keys(v), piece.queries(dout)
            part_lse, part_delta = piece.queries(row_lse), piece.queries(delta)
            items = inverse(piece, "grads")
            partial = q.new_empty((piece.pairs, piece.group, dim))
            item_dk, item_dv = (q.new_empty((items.count, block, dim), dtype=torch.float32) for _ in range(2))
            _grads[items.count,](
                part_q, part_k, part_v, part_dout, part_lse, part_delta, *items.arguments(), piece.place,
                piece.first_key, piece.first_block, partial, item_dk, item_dv,
                *strides_of(part_q, part_k, part_v, part_dout, part_lse), **piece.sizes(), scale=scale,
                **piece.switches(), BLOCK_K=piece.padded_block(), BLOCK_R=rows, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            part_dk, part_dv = piece.keys(dk), piece.keys(dv)
            _sum_items[items.blocks // items.chunks,](
                items.order, items.bounds, items.begin, piece.place, piece.first_key, piece.first_block, item_dk,
                item_dv, part_dk, part_dv, *strides_of(part_dk), items.chunks, items.slots, piece.keys_total,
                **piece.switches(), BLOCK_K=piece.padded_block(), num_warps=4,
            )  # fmt: skip
            part_dq = piece.queries(dq)
            sums = summed_rows(piece, q)
            _sum_pairs[triton.cdiv(part_lse.numel(), sums["BLOCK_R"]),](
                partial, piece.index, piece.place, part_dq, *strides_of(part_dq), part_lse.numel(), part_q.shape[1],
                **piece.switches(), **sums, num_warps=4,
            )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=INTEGERS)
def _grads(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, order_ptr, bounds_ptr, begin_ptr, block_ptr,
    each, blocks, chunks, slots, place_ptr, first_key_ptr, first_block_ptr, partial_ptr, item_dk_ptr, item_dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_lb, stride_lt, stride_lh, T, N, scale,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Matrices are held transposed, (keys, rows)."""
    first, last, batch, kv_head, key0, before = item_of(
        order_ptr, bounds_ptr, begin_ptr, block_ptr, each, blocks, chunks, slots, first_key_ptr, first_block_ptr,
        G, TOP, BLOCK,
    )  # fmt: skip
    if first >= last:
        return
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    dout_ptr += batch * stride_db + kv_head * GROUP * stride_dh
    numbers = batch * stride_lb + kv_head * GROUP * stride_lh
    end = min(key0 + BLOCK, N)
    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, key0, 0, end, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, key0, 0, end, stride_vt, BLOCK_K, D, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    row = (first * GROUP + tl.arange(0, BLOCK_R)).to(tl.uint32)
    pair = pairs_of(order_ptr, row, last * GROUP, GROUP, False)
    for r0 in range(first * GROUP, last * GROUP, BLOCK_R):
        row = (r0 + tl.arange(0, BLOCK_R)).to(tl.uint32)
        inside, member = row < last * GROUP, row % GROUP
        token = pair // (G * TOP)
        place = tl.load(place_ptr + token, mask=inside, other=0)
        token -= batch.to(tl.int32) * T
        at = numbers + tl.cast(token, tl.int64) * stride_lt + member * stride_lh
        row_lse = tl.load(row_lse_ptr + at, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        dout = load_rows(dout_ptr, token, member, stride_dt, stride_dh, inside, D, BLOCK_D)
        next_pair = pairs_of(order_ptr, row + BLOCK_R, last * GROUP, GROUP, False)  # as in _partial
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        seen = column[:, None] < tl.minimum(place + 1 - before, BLOCK)[None, :]
        p = tl.where(seen, tl.exp2(s - row_lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * scale
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if BLOCK_R == 32:  # too few for a warpgroup's product, which wants 64: the other way round
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
        else:  # 16 are taken where shared memory is too short for what that takes
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        store_scratch(partial_ptr, dq, tl.cast(pair, tl.int64) * GROUP + member, inside, D, BLOCK_D)
        pair = next_pair
    mine = tl.cast(tl.program_id(0), tl.int64) * BLOCK * D
    store_rows(item_dk_ptr + mine, dk, column, column * 0, D, 0, column < BLOCK, D, BLOCK_D)
    store_rows(item_dv_ptr + mine, dv, column, column * 0, D, 0, column < BLOCK, D, BLOCK_D)


@triton.jit(do_not_specialize=["chunks", "slots", "N"])
def _sum_items(
    order_ptr, bounds_ptr, begin_ptr, place_ptr, first_key_ptr, first_block_ptr, item_dk_ptr, item_dv_ptr,
    dk_ptr, dv_ptr, stride_b, stride_n, stride_h, chunks, slots, N,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a block's items to what earlier pieces left in dk and dv (B,N,G,D) float32. One program per block.

    It touches only the keys that some query saw: a document's last block reaches into the next one, whose keys are
    another program's to add to.
    """
    batch, kv_head, slot = tl.program_id(0) // slots // G, tl.program_id(0) // slots % G, tl.program_id(0) % slots
    block = tl.program_id(0) // slots * chunks * slots + slot  # in the first chunk
    first, last = -1, -1
    for chunk in range(0, chunks):
        earliest, beyond = tl.load(bounds_ptr + block + chunk * slots), tl.load(bounds_ptr + block + chunk * slots + 1)
        first = tl.where((first < 0) & (earliest < beyond), earliest, first)
        last = tl.where(earliest < beyond, beyond, last)
    if last < 0:
        return
    token = tl.load(order_ptr + first).to(tl.int32) // (G * TOP)
    before = (slot - tl.load(first_block_ptr + token)) * BLOCK
    key0 = tl.load(first_key_ptr + token) + before
    latest = tl.load(order_ptr + last - 1).to(tl.int32) // (G * TOP)  # pairs of a block are sorted by token
    seen = tl.minimum(tl.load(place_ptr + latest) + 1 - before, BLOCK)
    column = tl.arange(0, BLOCK_K)
    inside = (column < seen) & (key0 + column < N)
    corner = tl.cast(batch, tl.int64) * stride_b + tl.cast(kv_head, tl.int64) * stride_h
    dk = load_rows(dk_ptr + corner, key0 + column, column * 0, stride_n, 0, inside, D, BLOCK_D)
    dv = load_rows(dv_ptr + corner, key0 + column, column * 0, stride_n, 0, inside, D, BLOCK_D)
    for chunk in range(0, chunks):
        for item in range(tl.load(begin_ptr + block + chunk * slots), tl.load(begin_ptr + block + chunk * slots + 1)):
            at = tl.cast(item, tl.int64) * BLOCK * D
            dk += load_rows(item_dk_ptr + at, column, column * 0, D, 0, inside, D, BLOCK_D)
            dv += load_rows(item_dv_ptr + at, column, column * 0, D, 0, inside, D, BLOCK_D)
    store_rows(dk_ptr + corner, dk, key0 + column, column * 0, stride_n, 0, inside, D, BLOCK_D)
    store_rows(dv_ptr + corner, dv, key0 + column, column * 0, stride_n, 0, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "T"])
def _sum_pairs(
    partial_ptr, index_ptr, place_ptr, dq_ptr, stride_b, stride_t, stride_h, rows, T,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    inside, batch, t, head, at, there = rows_of_heads(
        index_ptr, place_ptr, rows, T, G, TOP, GROUP, BLOCK, BLOCK_TOP, BLOCK_R, False
    )
    dq = tl.sum(scratch_rows(partial_ptr, at, there, D, BLOCK_D), 1)
    store_rows(dq_ptr, dq, t, batch * stride_b + head * stride_h, stride_t, 1, inside, D, BLOCK_D)
