"""Attention over the blocks that each query chose, forward and backward, block by block (zoo/kernels/nsa.py).

    _partial    an item's queries against its block: a complete softmax each, as a partial output and log-sum-exp
    _merge      a query's first, previous and own block, and onto that its partial outputs by their log-sum-exp
    _grads      an item's part of dK and dV, and each query's part of dQ
    _sum_items  the parts of dK and dV of a block's items, in order
    _sum_pairs  the parts of dQ of a query

The loops go over the items of nsa_inverse.py: pairs of a query and one of its blocks, all of one block. With the R =
H/G query heads of a group a pair makes R rows of a tile. Scratch holds one row per pair and head.

The first, previous and own block are almost everybody's: in the forward a tile of neighbouring queries reads them
together, and they need no pairs. In the backward, and where there are few queries, they are blocks like all others.

Shapes: q, out (B,T,H,D); k, v (B,N,G,D); block_index (B,T,G,top); lse, row_lse, delta (B,T,H).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.nsa_compressed import load_rows, program, row_numbers, store_rows
from zoo.kernels.nsa_inverse import Items, Piece, inverse, is_near, pieces
from zoo.kernels.tiles import architecture, load_tile
from zoo.kernels.window import LN2, LOG2E, _on_device, _rows_contiguous, _strides

SUM_ROWS = 16
INTEGERS = ["T", "N", "slots", "chunks"]
# (rows, warps, stages), of merge (rows, keys, warps, stages), by bytes of a head's row in units of two
SM90 = {
    "merge": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2), 512: (16, 16, 4, 1)},
    "partial": {64: (128, 4, 3), 128: (128, 8, 3), 256: (64, 8, 2), 512: (16, 4, 1)},
    "grads": {64: (64, 4, 2), 128: (64, 8, 3), 256: (32, 8, 1), 512: (16, 4, 1)},
}
OTHER = {
    "merge": {64: (64, 32, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
    "partial": {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 1), 512: (16, 4, 1)},
    "grads": {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1), 512: (16, 4, 1)},
}


def choose_tile(kernel: str, q: Tensor) -> Any:
    width = max(64, triton.next_power_of_2(q.shape[3]) * q.dtype.itemsize // 2)
    table: dict[str, Any] = SM90 if architecture(q.device) == "sm90" else OTHER
    return table[kernel][width]


# ------------------------------------------------------------------------------------------------------- the launchers


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, places: Any, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32."""
    batch, length, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, length, heads), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    rows, warps, stages = choose_tile("partial", q)
    with _on_device(q):
        for piece in pieces(q, k, block_index, places, block):
            part_q, part_k, part_v = piece.queries(q), piece.keys(k), piece.keys(v)
            items = inverse(piece, "partial")
            partial = q.new_empty((piece.pairs, piece.group, dim))
            partial_lse = q.new_empty((piece.pairs, piece.group), dtype=torch.float32)
            _partial[items.count,](
                part_q, part_k, part_v, items.order, items.block, items.first, items.last, piece.place,
                piece.first_key, piece.first_block, partial, partial_lse, *_strides(part_q), *_strides(part_k),
                *_strides(part_v), items.chunks, **piece.sizes(scale), **piece.switches(),
                BLOCK_R=_fit(rows, items, piece), num_warps=warps, num_stages=stages,
            )  # fmt: skip
            part_out, part_lse = piece.queries(out), piece.queries(lse)
            tile_rows, tile_keys, tile_warps, tile_stages = choose_tile("merge", q)
            programs = triton.cdiv(part_q.shape[1] * piece.group, tile_rows) * part_q.shape[0] * part_k.shape[2]
            _merge[programs,](
                part_q, part_k, part_v, partial, partial_lse, piece.index, piece.place, piece.first_key, part_out,
                part_lse, *_strides(part_q), *_strides(part_k), *_strides(part_v), *_strides(part_out),
                *_strides(part_lse), part_q.shape[1], part_k.shape[1], part_k.shape[2], scale, **piece.row_switches(),
                BLOCK=block, BLOCK_K=tile_keys, BLOCK_R=tile_rows, TOGETHER=items.together,
                num_warps=tile_warps, num_stages=tile_stages,
            )  # fmt: skip
    return out, lse


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
    q, k, v, dout, out = (_rows_contiguous(x) for x in (q, k, v, dout, out))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    rows, warps, stages = choose_tile("grads", q)
    with _on_device(q):
        row_lse, delta = row_numbers(dout, dlse, out, lse)
        for piece in pieces(q, k, block_index, places, block):
            part_q, part_k, part_v, part_dout = piece.queries(q), piece.keys(k), piece.keys(v), piece.queries(dout)
            part_lse, part_delta = piece.queries(row_lse), piece.queries(delta)
            items = inverse(piece, "grads")
            partial = q.new_empty((piece.pairs, piece.group, dim))
            item_dk, item_dv = (q.new_empty((items.count, block, dim), dtype=torch.float32) for _ in range(2))
            _grads[items.count,](
                part_q, part_k, part_v, part_dout, part_lse, part_delta, items.order, items.block, items.first,
                items.last, piece.place, piece.first_key, piece.first_block, partial, item_dk, item_dv,
                *_strides(part_q), *_strides(part_k), *_strides(part_v), *_strides(part_dout), *_strides(part_lse),
                items.chunks, **piece.sizes(scale), **piece.switches(),
                BLOCK_R=_fit(rows, items, piece), num_warps=warps, num_stages=stages,
            )  # fmt: skip
            part_dk, part_dv = piece.keys(dk), piece.keys(dv)
            _sum_items[items.blocks // items.chunks,](
                items.order, items.first, items.last, items.begin, piece.place, piece.first_key, piece.first_block,
                item_dk, item_dv, part_dk, part_dv, *_strides(part_dk), items.chunks, **piece.sizes(scale),
                **piece.switches(), num_warps=4,
            )  # fmt: skip
            part_dq = piece.queries(dq)
            _sum_pairs[triton.cdiv(part_lse.numel(), SUM_ROWS),](
                partial, piece.index, piece.place, part_dq, *_strides(part_dq), part_lse.numel(), part_q.shape[1],
                part_k.shape[2], block, **piece.row_switches(), BLOCK_R=SUM_ROWS, num_warps=4,
            )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _fit(rows: int, items: Items, piece: Piece) -> int:
    """Rows of a tile: no more than an item has."""
    return min(rows, max(16, triton.next_power_of_2(piece.group))) if items.single else rows


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _open(
    item_first, order_ptr, block_ptr, first_key_ptr, first_block_ptr, chunks, G, slots, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of this program's item: (row of the batch, kv head, place of its block, that block's first key)."""
    block = tl.load(block_ptr + tl.program_id(0))
    slot = block % slots
    token = tl.load(order_ptr + item_first) // (G * TOP)  # counted through the batch
    key0 = tl.load(first_key_ptr + token) + (slot - tl.load(first_block_ptr + token)) * BLOCK
    head = block // slots // chunks
    return tl.cast(head // G, tl.int64), tl.cast(head % G, tl.int64), slot, key0


@triton.jit
def _item_rows(
    row, inside, order_ptr, place_ptr, first_block_ptr, batch, slot, T, G,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(pair, token, member, how many of the block's keys it sees) of rows of an item."""
    pair = tl.load(order_ptr + row // GROUP, mask=inside, other=0)
    token = pair // (G * TOP)
    place = tl.load(place_ptr + token, mask=inside, other=0)
    first = tl.load(first_block_ptr + token, mask=inside, other=0)
    seen = tl.where(inside, place + 1 - (slot - first) * BLOCK, BLOCK)
    return pair, token - batch.to(tl.int32) * T, row % GROUP, tl.minimum(seen, BLOCK)


@triton.jit(do_not_specialize=INTEGERS)
def _partial(
    q_ptr, k_ptr, v_ptr, order_ptr, block_ptr, item_first_ptr, item_last_ptr, place_ptr, first_key_ptr,
    first_block_ptr, partial_ptr, partial_lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    chunks, T, N, G, slots, scale,
    TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first, last = tl.load(item_first_ptr + tl.program_id(0)), tl.load(item_last_ptr + tl.program_id(0))
    if first >= last:
        return
    batch, kv_head, slot, key0 = _open(
        first, order_ptr, block_ptr, first_key_ptr, first_block_ptr, chunks, G, slots, TOP, BLOCK
    )
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    beyond = min(key0 + BLOCK, N)
    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, key0, 0, beyond, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, key0, 0, beyond, stride_vt, BLOCK_K, D, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    for r0 in range(first * GROUP, last * GROUP, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        inside = row < last * GROUP
        pair, token, member, seen = _item_rows(
            row, inside, order_ptr, place_ptr, first_block_ptr, batch, slot, T, G, GROUP, TOP, BLOCK
        )
        q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        s = tl.where(column[None, :] < seen[:, None], s, -float("inf"))  # every pair sees its block's first key
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        store_rows(partial_ptr, out, pair, member, GROUP * D, D, inside, D, BLOCK_D)
        at = tl.cast(pair, tl.int64) * GROUP + member
        tl.store(partial_lse_ptr + at, top + tl.log2(total), mask=inside)


@triton.jit
def _weigh(top, total, acc, s, v):
    """The online softmax's next tile: logits s (in log2) of values v."""
    new_top = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s - pivot[:, None])
    shrink = tl.exp2(top - pivot)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=INTEGERS)
def _merge(
    q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr, index_ptr, place_ptr, first_key_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, T, N, G, scale,
    TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Rows of one key/value head. The keys of their near blocks lie in two ranges: the first block of the first row's
    document, and from that row's previous block to the last row's own. A document that begins later, with its first
    block, lies in the second; where they would meet there is only the second."""
    tile, batch, kv_head = program(tl.program_id(0), tl.cdiv(T * GROUP, BLOCK_R), G)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    t, member, inside = row // GROUP, row % GROUP, row < T * GROUP
    place_ptr += batch * T
    first_key_ptr += batch * T
    place = tl.load(place_ptr + t, mask=inside, other=-1)
    own = place // BLOCK
    choice = (batch * T + t) * G + kv_head
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if TOGETHER:
        with_first, with_previous, with_own = row < 0, row < 0, row < 0  # none yet
        for i in range(0, TOP):
            chosen = tl.load(index_ptr + choice * TOP + i, mask=inside, other=-1)
            there = (chosen >= 0) & inside
            with_first = with_first | (there & (chosen == 0))
            with_previous = with_previous | (there & (chosen == own - 1))
            with_own = with_own | (there & (chosen == own))
        q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        q = load_rows(q_ptr, t, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        first_key = tl.load(first_key_ptr + t, mask=inside, other=0)
        earliest, latest = tile * BLOCK_R // GROUP, min((tile * BLOCK_R + BLOCK_R - 1) // GROUP, T - 1)
        start = tl.load(first_key_ptr + earliest)
        previous = start + max(tl.load(place_ptr + earliest) // BLOCK - 1, 0) * BLOCK
        beyond = min(tl.load(first_key_ptr + latest) + tl.load(place_ptr + latest) + 1, N)
        apart = tl.where(previous > start, tl.cdiv(BLOCK, BLOCK_K), 0)  # tiles of the first range
        for i in range(0, apart + tl.cdiv(beyond - previous, BLOCK_K)):
            k0 = tl.where(i < apart, start + i * BLOCK_K, previous + (i - apart) * BLOCK_K)
            end = tl.where(i < apart, min(start + BLOCK, N), beyond)
            key = k0 + tl.arange(0, BLOCK_K)
            k = load_tile(k_ptr, k0, 0, end, stride_kt, BLOCK_K, D, BLOCK_D)
            v = load_tile(v_ptr, k0, 0, end, stride_vt, BLOCK_K, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            at = key[None, :] - first_key[:, None]
            block = at // BLOCK
            mine = (block == own[:, None]) & with_own[:, None]
            mine = mine | ((block == own[:, None] - 1) & with_previous[:, None])
            mine = mine | ((block == 0) & with_first[:, None])
            seen = mine & (at >= 0) & (at <= place[:, None]) & (key < end)[None, :]
            top, total, acc = _weigh(top, total, acc, tl.where(seen, s, -float("inf")), v)
    for i in range(0, TOP):
        chosen = tl.load(index_ptr + choice * TOP + i, mask=inside, other=-1)
        there = (chosen >= 0) & (chosen <= own)
        if TOGETHER:
            there = there & (is_near(chosen, own) == 0)
        pair = choice * TOP + i
        lse = tl.load(partial_lse_ptr + pair * GROUP + member, mask=there, other=-float("inf"))
        partial = load_rows(partial_ptr, pair, member, GROUP * D, D, there, D, BLOCK_D)
        new_top = tl.maximum(top, lse)
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(lse - pivot)
        shrink = tl.exp2(top - pivot)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * partial.to(tl.float32)
        top = new_top
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
    out_ptr += batch * stride_ob + kv_head * GROUP * stride_oh
    store_rows(out_ptr, out, t, member, stride_ot, stride_oh, inside, D, BLOCK_D)
    at = batch * stride_lb + tl.cast(t, tl.int64) * stride_lt + (kv_head * GROUP + member) * stride_lh
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _grads(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, order_ptr, block_ptr, item_first_ptr, item_last_ptr,
    place_ptr, first_key_ptr, first_block_ptr, partial_ptr, item_dk_ptr, item_dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, stride_lb, stride_lt, stride_lh, chunks, T, N, G, slots, scale,
    TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Matrices are held transposed, (keys, rows)."""
    item = tl.cast(tl.program_id(0), tl.int64)
    first, last = tl.load(item_first_ptr + item), tl.load(item_last_ptr + item)
    if first >= last:
        return
    batch, kv_head, slot, key0 = _open(
        first, order_ptr, block_ptr, first_key_ptr, first_block_ptr, chunks, G, slots, TOP, BLOCK
    )
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    dout_ptr += batch * stride_db + kv_head * GROUP * stride_dh
    numbers = batch * stride_lb + kv_head * GROUP * stride_lh
    beyond = min(key0 + BLOCK, N)
    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, key0, 0, beyond, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, key0, 0, beyond, stride_vt, BLOCK_K, D, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for r0 in range(first * GROUP, last * GROUP, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        inside = row < last * GROUP
        pair, token, member, seen = _item_rows(
            row, inside, order_ptr, place_ptr, first_block_ptr, batch, slot, T, G, GROUP, TOP, BLOCK
        )
        at = numbers + tl.cast(token, tl.int64) * stride_lt + member * stride_lh
        row_lse = tl.load(row_lse_ptr + at, mask=inside, other=float("inf"))
        q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p = tl.where(column[:, None] < seen[None, :], tl.exp2(s - row_lse[None, :]), 0.0)
        dout = load_rows(dout_ptr, token, member, stride_dt, stride_dh, inside, D, BLOCK_D)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * scale
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        store_rows(partial_ptr, dq, pair, member, GROUP * D, D, inside, D, BLOCK_D)
    mine = item * BLOCK * D
    store_rows(item_dk_ptr + mine, dk, column, column * 0, D, 0, column < BLOCK, D, BLOCK_D)
    store_rows(item_dv_ptr + mine, dv, column, column * 0, D, 0, column < BLOCK, D, BLOCK_D)


@triton.jit(do_not_specialize=INTEGERS)
def _sum_items(
    order_ptr, item_first_ptr, item_last_ptr, begin_ptr, place_ptr, first_key_ptr, first_block_ptr,
    item_dk_ptr, item_dv_ptr, dk_ptr, dv_ptr,
    stride_b, stride_n, stride_h, chunks, T, N, G, slots, scale,
    TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a block's items to what earlier pieces left in dk and dv (B,N,G,D) float32. One program per block.

    It touches only the keys that some query saw: a document's last block reaches into the next one, whose keys are
    another program's to add to.
    """
    batch, kv_head, slot = tl.program_id(0) // slots // G, tl.program_id(0) // slots % G, tl.program_id(0) % slots
    block = tl.program_id(0) // slots * chunks * slots + slot  # in the first chunk
    begin, end = -1, -1
    for chunk in range(0, chunks):
        earliest, beyond = tl.load(begin_ptr + block + chunk * slots), tl.load(begin_ptr + block + chunk * slots + 1)
        begin = tl.where((begin < 0) & (earliest < beyond), earliest, begin)
        end = tl.where(earliest < beyond, beyond, end)
    if end < 0:
        return
    token = tl.load(order_ptr + tl.load(item_first_ptr + begin)) // (G * TOP)
    before = (slot - tl.load(first_block_ptr + token)) * BLOCK
    key0 = tl.load(first_key_ptr + token) + before
    latest = tl.load(order_ptr + tl.load(item_last_ptr + end - 1) - 1) // (G * TOP)  # pairs are sorted by token
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


@triton.jit
def _sum_pairs(
    partial_ptr, index_ptr, place_ptr, dq_ptr, stride_b, stride_t, stride_h, rows, T, G, block,
    TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, head, token = row < rows, row % (G * GROUP), row // (G * GROUP)  # of (B,T,H); the token through the batch
    batch, t, choice, member = token // T, token % T, token * G + head // GROUP, head % GROUP
    own = tl.load(place_ptr + token, mask=inside, other=0) // block
    dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in range(0, TOP):
        chosen = tl.load(index_ptr + choice * TOP + i, mask=inside, other=-1)
        there = (chosen >= 0) & (chosen <= own)
        dq += load_rows(partial_ptr, choice * TOP + i, member, GROUP * D, D, there, D, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, dq, t, batch * stride_b + head * stride_h, stride_t, 1, inside, D, BLOCK_D)
