"""Attention over the blocks that each query chose, block by block: the forward pass (zoo/kernels/nsa.py).

    _near       a tile of queries against their first, previous and own block
    _partial    an item's queries against its block: a complete softmax each, as a partial output and log-sum-exp
    _merge      a query's near output and its partial ones by their log-sum-exp, and the sum with NSA's other branches

The loops go over the items of nsa_inverse.py: pairs of a query and one of its blocks, all of one block. With the R =
H/G query heads of a group a pair makes R rows of a tile. Scratch holds one row per pair and head.

The first, previous and own block are almost everybody's: in the forward a tile of neighbouring queries reads them
together, and they need no pairs. In the backward (nsa_selected_backward.py), and where there are few queries, they are
blocks like all others.

Shapes: q, out (B,T,H,D); k, v (B,N,G,D); block_index (B,T,G,top); lse (B,T,H).
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.nsa_compressed import load_rows, program, store_rows
from zoo.kernels.nsa_inverse import Items, inverse, item_of
from zoo.kernels.nsa_mix import gate_of
from zoo.kernels.nsa_near import sees
from zoo.kernels.nsa_piece import Piece, is_wanted, pieces
from zoo.kernels.tiles import architecture, load_tile
from zoo.kernels.units import LN2, LOG2E

FEW_PAIRS = 2048  # up to so many, a program per pair: nothing to sort, and no block is read by many
NO_ITEMS = (None,) * 4 + (0,) * 4  # as Items.arguments()
SUM_BYTES = 32 << 10  # of scratch rows that a program of _merge or _sum_pairs holds: 16 loads of 16 bytes a thread
INTEGERS = ["T", "N", "each", "blocks", "chunks", "slots"]
# (rows, warps, stages), of near (rows, keys, warps, stages), by bytes of a head's row in units of two. 32 rows of grads
# never take one stage: an H200 then finds wrong numbers, or an illegal address (docs/kernels.md)
SM90 = {
    "near": {64: (128, 64, 8, 2), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2), 512: (16, 16, 4, 1)},
    "partial": {64: (128, 4, 3), 128: (64, 4, 2), 256: (64, 8, 2), 512: (16, 4, 1)},
    "grads": {64: (64, 4, 2), 128: (32, 4, 3), 256: (32, 8, 2), 512: (16, 4, 1)},  # 32 rows in one stage: see docs
}
OTHER = {
    "near": {64: (64, 32, 4, 2), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
    "partial": {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 1), 512: (16, 4, 1)},
    "grads": {64: (64, 4, 1), 128: (32, 4, 2), 256: (16, 4, 1), 512: (16, 4, 1)},
}


Near = Callable[[Piece, Tensor, Tensor, Tensor, Tensor, Tensor, float], None]
Far = Callable[[Piece, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def choose_tile(kernel: str, q: Tensor) -> Any:
    width = max(64, triton.next_power_of_2(q.shape[3]) * q.dtype.itemsize // 2)
    table: dict[str, Any] = SM90 if architecture(q.device) == "sm90" else OTHER
    return table[kernel][width]


# ------------------------------------------------------------------------------------------------------- the launchers


def near_outputs(piece: Piece, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """Writes to out, and to lse in log2."""
    rows, keys, warps, stages = choose_tile("near", q)
    programs = triton.cdiv(q.shape[1] * piece.group, rows) * q.shape[0] * k.shape[2]
    _near[programs,](
        q, k, v, piece.index, piece.place, piece.first_key, out, lse, *strides_of(q, k, v, out, lse),
        **piece.sizes(), scale=scale, **piece.switches(),
        BLOCK_TOP=triton.next_power_of_2(piece.top), BLOCK_K=keys, BLOCK_R=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def scratch(piece: Piece, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of what the pairs leave: outputs (pairs, R, D), and (pairs, R) their log-sum-exp in log2."""
    partial = q.new_empty((piece.pairs, piece.group, piece.dim))
    return partial, q.new_empty((piece.pairs, piece.group), dtype=torch.float32)


def far_outputs(piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scratch of all pairs, written where a block is neither the first, nor the previous, nor the own one."""
    return _partial_outputs(piece, inverse(piece, "partial"), q, k, v, scale)


def _partial_outputs(
    piece: Piece, items: Items | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Scratch, written of the pairs in `items`, or of all in a program each."""
    partial, lse = scratch(piece, q)
    rows, warps, stages = choose_tile("partial", q)
    if items is None:
        rows = min(rows, max(16, triton.next_power_of_2(piece.group)))
    count, arguments = (piece.pairs, NO_ITEMS) if items is None else (items.count, items.arguments())
    _partial[count,](
        q, k, v, *arguments, piece.index, piece.place, piece.first_key, piece.first_block, partial, lse,
        *strides_of(q, k, v), **piece.sizes(), scale=scale, **piece.switches(), BLOCK_K=piece.padded_block(),
        BLOCK_R=rows, SINGLE=items is None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial, lse


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    places: Any,
    block: int,
    scale: float,
    near: Near = near_outputs,
    far: Far = far_outputs,
) -> tuple[Tensor, Tensor]:
    """out like q and natural-log lse (B,T,H) float32. near, far: do what `near_outputs` and `far_outputs` do."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, _attend(q, k, v, block_index, places, block, scale, out, near, far, None)


def selected_mix_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    gates: Tensor,
    compressed: Tensor,
    window: Tensor,
    places: Any,
    block: int,
    scale: float,
    keep: bool,
    near: Near = near_outputs,
    far: Far = far_outputs,
) -> tuple[Tensor, Tensor, Tensor]:
    """What mix_forward of nsa_mix.py makes of the three branches, of 16-bit ones bit for bit; the selected branch's out
    (of no tokens unless `keep`) and lse. gates (B,T,H,3), any float dtype; compressed and window like q."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    mixed = torch.empty_like(out) if keep else out
    others = [x.contiguous() for x in (gates, compressed, window)]
    lse = _attend(q, k, v, block_index, places, block, scale, out, near, far, (*others, mixed))
    return mixed, out if keep else out.new_empty((out.shape[0], 0, *out.shape[2:])), lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    places: Any,
    block: int,
    scale: float,
    out: Tensor,
    near: Near,
    far: Far,
    mix: tuple[Tensor, ...] | None,
) -> Tensor:
    """Writes out and returns lse. mix: gates, the compressed and the window branch, and where their sum with out goes,
    which may be out."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return lse
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    with on_device(q):
        for piece in pieces(q, k, block_index, places, block):
            part_q, part_k, part_v = piece.queries(q), piece.keys(k), piece.keys(v)
            part_out, part_lse = piece.queries(out), piece.queries(lse)
            many = piece.pairs > FEW_PAIRS
            if many:
                partial = far(piece, part_q, part_k, part_v, scale)
                near(piece, part_q, part_k, part_v, part_out, part_lse, scale)
            else:
                partial = _partial_outputs(piece, None, part_q, part_k, part_v, scale)
            sums = summed_rows(piece, q)
            part_mix = (None,) * 4 if mix is None else [piece.queries(x) for x in mix]
            keep = mix is None or mix[-1] is not out
            _merge[triton.cdiv(part_lse.numel(), sums["BLOCK_R"]),](
                *partial, piece.index, piece.place, part_out, part_lse, *part_mix, *strides_of(part_out, part_lse),
                part_lse.numel(), part_q.shape[1], **piece.switches(), **sums, NEAR=many, KEEP=keep, num_warps=4,
            )  # fmt: skip
    return lse


def summed_rows(piece: Piece, q: Tensor) -> dict[str, int]:
    padded = triton.next_power_of_2(piece.top)
    row_bytes = triton.next_power_of_2(piece.dim) * q.element_size()
    return {"BLOCK_TOP": padded, "BLOCK_R": max(1, SUM_BYTES // (padded * row_bytes))}


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _single(
    index_ptr, place_ptr, first_key_ptr, T, G: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """As `item_of`, where the item is the pair of this program's number."""
    pair = tl.program_id(0)
    token = pair // (G * TOP)
    chosen = tl.load(index_ptr + pair)
    wanted = is_wanted(chosen, tl.load(place_ptr + token) // BLOCK, False)
    before = tl.where(wanted, chosen, 0) * BLOCK
    batch, kv_head = tl.cast(token // T, tl.int64), tl.cast(pair // TOP % G, tl.int64)
    return pair, pair + wanted.to(tl.int32), batch, kv_head, tl.load(first_key_ptr + token) + before, before


@triton.jit(do_not_specialize=INTEGERS)
def _partial(
    q_ptr, k_ptr, v_ptr, order_ptr, bounds_ptr, begin_ptr, block_ptr, each, blocks, chunks, slots,
    index_ptr, place_ptr, first_key_ptr, first_block_ptr, partial_ptr, partial_lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, T, N, scale,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        first, last, batch, kv_head, key0, before = _single(index_ptr, place_ptr, first_key_ptr, T, G, TOP, BLOCK)
        seen = tl.minimum(tl.load(place_ptr + first // (G * TOP)) + 1 - before, BLOCK)
    else:
        first, last, batch, kv_head, key0, _ = item_of(
            order_ptr, bounds_ptr, begin_ptr, block_ptr, each, blocks, chunks, slots, first_key_ptr, first_block_ptr,
            G, TOP, BLOCK,
        )  # fmt: skip
        seen = BLOCK  # none is anybody's own
    if first >= last:
        return
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    end = min(key0 + seen, N)
    k = load_tile(k_ptr + batch * stride_kb + kv_head * stride_kh, key0, 0, end, stride_kt, BLOCK_K, D, BLOCK_D)
    v = load_tile(v_ptr + batch * stride_vb + kv_head * stride_vh, key0, 0, end, stride_vt, BLOCK_K, D, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    row = (first * GROUP + tl.arange(0, BLOCK_R)).to(tl.uint32)
    pair = pairs_of(order_ptr, row, last * GROUP, GROUP, SINGLE)
    for r0 in range(first * GROUP, last * GROUP, BLOCK_R):
        row = (r0 + tl.arange(0, BLOCK_R)).to(tl.uint32)
        inside, member = row < last * GROUP, row % GROUP
        token = pair // (G * TOP) - batch.to(tl.int32) * T
        q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
        # The next tile's, so that its queries are a load from known addresses and can be under way by then.
        next_pair = pairs_of(order_ptr, row + BLOCK_R, last * GROUP, GROUP, SINGLE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if SINGLE or BLOCK != BLOCK_K:
            s = tl.where((key0 + column < end)[None, :], s, -float("inf"))
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1 / total)[:, None]
        at = tl.cast(pair, tl.int64) * GROUP + member
        store_scratch(partial_ptr, out, at, inside, D, BLOCK_D)
        tl.store(partial_lse_ptr + at, top + tl.log2(total), mask=inside)
        pair = next_pair


@triton.jit
def store_scratch(partial_ptr, tile, at, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """To rows `at`; in the L2 cache they make room first, for the queries, which are read again."""
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    to = partial_ptr + at[:, None] * D + column[None, :]
    tl.store(to, tile.to(partial_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def pairs_of(order_ptr, row, last, GROUP: tl.constexpr, SINGLE: tl.constexpr):
    """Of rows of an item before `last`. Like rows unsigned, so that their divisions are shifts."""
    if SINGLE:
        pair = row // GROUP
    else:
        pair = tl.load(order_ptr + row // GROUP, mask=row < last, other=0).to(tl.uint32)
    return pair


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
def _near(
    q_ptr, k_ptr, v_ptr, index_ptr, place_ptr, first_key_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, T, N, scale,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
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
    first_key = tl.load(first_key_ptr + t, mask=inside, other=0)
    i = tl.arange(0, BLOCK_TOP)
    choice = (batch * T + t) * G + kv_head
    chosen = tl.load(
        index_ptr + choice[:, None] * TOP + i[None, :], mask=inside[:, None] & (i < TOP)[None, :], other=-1
    )
    first_high, low, high = sees(chosen, place, first_key, BLOCK)
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    q = load_rows(q_ptr, t, member, stride_qt, stride_qh, inside, D, BLOCK_D)
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    earliest, latest = tile * BLOCK_R // GROUP, min((tile * BLOCK_R + BLOCK_R - 1) // GROUP, T - 1)
    start = tl.load(first_key_ptr + earliest)
    previous = start + max(tl.load(place_ptr + earliest) // BLOCK - 1, 0) * BLOCK
    beyond = min(tl.load(first_key_ptr + latest) + tl.load(place_ptr + latest) + 1, N)
    apart = tl.where(previous > start, tl.cdiv(BLOCK, BLOCK_K), 0)  # tiles of the first range
    for step in range(0, apart + tl.cdiv(beyond - previous, BLOCK_K)):
        k0 = tl.where(step < apart, start + step * BLOCK_K, previous + (step - apart) * BLOCK_K)
        end = tl.where(step < apart, min(start + BLOCK, N), beyond)
        key = k0 + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, k0, 0, end, stride_kt, BLOCK_K, D, BLOCK_D)
        v = load_tile(v_ptr, k0, 0, end, stride_vt, BLOCK_K, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        seen = seen | ((key[None, :] >= first_key[:, None]) & (key[None, :] < first_high[:, None]))
        seen = seen & (key < end)[None, :]
        top, total, acc = _weigh(top, total, acc, tl.where(seen, s, -float("inf")), v)
    there = total > 0
    out = acc * (1 / tl.where(there, total, 1.0))[:, None]
    lse = tl.where(there, top + tl.log2(tl.where(there, total, 1.0)), -float("inf"))
    out_ptr += batch * stride_ob + kv_head * GROUP * stride_oh
    store_rows(out_ptr, out, t, member, stride_ot, stride_oh, inside, D, BLOCK_D)
    at = batch * stride_lb + tl.cast(t, tl.int64) * stride_lt + (kv_head * GROUP + member) * stride_lh
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit
def rows_of_heads(
    index_ptr, place_ptr, rows, T, G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_TOP: tl.constexpr, BLOCK_R: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """This program's rows of (B,T,H): (whether it is one, batch, t, head), and of each row (BLOCK_R, BLOCK_TOP) the
    places of its pairs in scratch and whether they are any."""
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, head, token = row < rows, row % (G * GROUP), row // (G * GROUP)
    own = tl.load(place_ptr + token, mask=inside, other=0) // BLOCK
    i = tl.arange(0, BLOCK_TOP)[None, :]
    pair = (token * G + head // GROUP)[:, None] * TOP + i
    chosen = tl.load(index_ptr + pair, mask=inside[:, None] & (i < TOP), other=-1)
    at = pair * GROUP + (head % GROUP)[:, None]
    return inside, token // T, token % T, head, at, is_wanted(chosen, own[:, None], FAR)


@triton.jit
def scratch_rows(partial_ptr, at, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_R, BLOCK_TOP, BLOCK_D) in float32. Triton lays the threads along the last dimension, then along the first:
    each has all that it sums up, 16 loads that are under way at once, and exchanges nothing."""
    column = tl.arange(0, BLOCK_D)[None, None, :]
    mask = there[:, :, None]
    if D != BLOCK_D:
        mask = mask & (column < D)
    partial = tl.load(partial_ptr + at[:, :, None] * D + column, mask=mask, other=0.0, eviction_policy="evict_first")
    return partial.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "T"])
def _merge(
    partial_ptr, partial_lse_ptr, index_ptr, place_ptr, out_ptr, lse_ptr,
    gates_ptr, compressed_ptr, window_ptr, mixed_ptr,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lt, stride_lh, rows, T,
    G: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_R: tl.constexpr, NEAR: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With NEAR out and lse hold what `_near` left, and the near blocks are no pairs. The other branches and the sum
    lie like out, gates have 3 for each D of it. Without KEEP the sum may take out's place."""
    inside, batch, t, head, at, there = rows_of_heads(
        index_ptr, place_ptr, rows, T, G, TOP, GROUP, BLOCK, BLOCK_TOP, BLOCK_R, NEAR
    )
    corner = batch * stride_ob + head * stride_oh
    lse_at = lse_ptr + batch * stride_lb + t * stride_lt + head * stride_lh
    if NEAR:
        near_lse = tl.load(lse_at, mask=inside, other=-float("inf"))
        near = load_rows(out_ptr, t, corner, stride_ot, 1, inside, D, BLOCK_D).to(tl.float32)
    if mixed_ptr is not None:
        kind: tl.constexpr = out_ptr.dtype.element_ty
        row = (corner + t * stride_ot) // D
        compressed = load_rows(compressed_ptr, t, corner, stride_ot, 1, inside, D, BLOCK_D)
        window = load_rows(window_ptr, t, corner, stride_ot, 1, inside, D, BLOCK_D)
        first = gate_of(gates_ptr, row, inside, kind)
        second = gate_of(gates_ptr + 1, row, inside, kind)
        third = gate_of(gates_ptr + 2, row, inside, kind)
    lse = tl.load(partial_lse_ptr + at, mask=there, other=-float("inf"))
    partial = scratch_rows(partial_ptr, at, there, D, BLOCK_D)
    top = tl.max(lse, 1)
    if NEAR:
        top = tl.maximum(top, near_lse)
    pivot = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(lse - pivot[:, None])
    total = tl.sum(weight, 1)
    acc = tl.sum(partial * weight[:, :, None], 1)
    if NEAR:
        near_weight = tl.exp2(near_lse - pivot)
        total += near_weight
        acc += near * near_weight[:, None]
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = (acc * (1 / total)[:, None]).to(out_ptr.dtype.element_ty)
    if KEEP:
        store_rows(out_ptr, out, t, corner, stride_ot, 1, inside, D, BLOCK_D)
    if mixed_ptr is not None:
        mixed = compressed.to(tl.float32) * first + out.to(tl.float32) * second + window.to(tl.float32) * third
        store_rows(mixed_ptr, mixed, t, corner, stride_ot, 1, inside, D, BLOCK_D)
    tl.store(lse_at, tl.where(seen, (pivot + tl.log2(total)) * LN2, -float("inf")), mask=inside)
