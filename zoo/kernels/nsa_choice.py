"""The choice of `top` blocks per token, from the probabilities of the compressed branch (zoo/kernels/nsa.py).

    _choose     scores once more, now as probabilities; summed over the group, the best chosen per token: by a bitonic
                network that sorts the best of each run of blocks, then by a close look at the runs that reach them

Shapes: q (B,T,H,D); k, compressed, (B,M,G,D); lse (B,T,H); place, first_block (B,T) int32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import on_device, rows_contiguous, strides_of
from zoo.kernels.nsa_compressed import INTEGERS, choose_tile, load_rows, program, sizes_of, switches_of
from zoo.kernels.units import LOG2E

MOST = tl.constexpr(0x7FFFFFFE)  # as a key: importance is at most that, the bits of a float and not more
CHOOSERS = 2  # programs of _choose on a multiprocessor; each walks an equal share of the items, and has room for one
SORTED = 1024  # scores that a program of _choose sorts at once: more would make warps share a token
RUN = 4  # neighbouring blocks that _choose passes over together unless one of them is good enough: a vector of loads


def choose(q: Tensor, k: Tensor, lse: Tensor, places: Any, geometry: Any, scale: float) -> Tensor:
    """block_index (B,T,G,top) int32, ascending, then -1, from the log-sum-exp that `attend` returned."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    index = torch.empty((batch, length, kv_heads, geometry.top), dtype=torch.int32, device=q.device)
    if q.numel() == 0 or not geometry.top:
        return index
    q, k = (rows_contiguous(x) for x in (q, k))
    with on_device(q):
        rows, slots, warps, stages = choose_tile("choose", q, length * heads // kv_heads)
        group = triton.next_power_of_2(heads // kv_heads)
        tokens, kept = max(1, rows // group, 16 // group), triton.next_power_of_2(geometry.top)
        sort = max(kept, min(128, SORTED // tokens))
        short = 2 * kept
        items = triton.cdiv(length, tokens) * batch * kv_heads
        programs = min(items, CHOOSERS * multiprocessors(q))
        chunks = triton.cdiv(k.shape[1] // geometry.ratio + 2, RUN * sort)
        size = chunks * sort * (RUN + 1) + short
        room = torch.empty(programs * tokens * size, dtype=torch.int32, device=q.device)
        _choose[programs,](
            q, k, lse, places.place, places.first_block, room, index, *strides_of(q, k), items, chunks,
            **sizes_of(q, k, scale), **switches_of(q, k, geometry), SELECT=geometry.select, OVERLAP=geometry.overlap,
            SHIFT=geometry.shift, TOP=geometry.top, KEPT=kept, TOKENS=tokens, PADDED_GROUP=group, BLOCK_J=slots,
            BLOCK_C=2 * sort, BLOCK_S=sort, SHORT=short, RUN=RUN,
            num_warps=warps, num_stages=stages, maxnreg=registers(warps),
        )  # fmt: skip
    return index


def multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def registers(warps: int) -> int:
    """What leaves room for all programs of `_choose` that share a multiprocessor."""
    return min(255, 65536 // (CHOOSERS * 32 * warps))


# -------------------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=INTEGERS)
def _choose(
    q_ptr, k_ptr, lse_ptr, place_ptr, first_ptr, room_ptr, index_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, items, chunks, T, M, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, SELECT: tl.constexpr, OVERLAP: tl.constexpr, SHIFT: tl.constexpr, TOP: tl.constexpr,
    KEPT: tl.constexpr, TOKENS: tl.constexpr, PADDED_GROUP: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, SHORT: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The blocks of TOKENS tokens of one key/value head, item after item. An item's scores wait in the program's own
    room, (TOKENS, width), and the largest key of each run of RUN blocks. The TOP-th largest of those is at most the
    TOP-th largest key, so only runs that reach it hold what is wanted: as a rule TOP of them. They are listed, in
    order, and the list, with SHORT places for a token, is what is looked at closely: once for the TOP-th largest key,
    once for those above it. Where there are few runs, or the list doesn't suffice (many equal ones), all of them are.
    """
    width = chunks * (RUN * BLOCK_S)
    peaks = width // RUN
    room = room_ptr + tl.cast(tl.program_id(0), tl.int64) * TOKENS * (width + peaks + SHORT)
    peak_room = room + TOKENS * width
    short = peak_room + TOKENS * peaks
    row = tl.arange(0, TOKENS)[:, None]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, batch, kv_head = program(item, tl.cdiv(T, TOKENS), G)
        t0 = tile * TOKENS
        each = t0 + tl.arange(0, TOKENS)
        places = place_ptr + batch * T
        firsts = first_ptr + batch * T
        begin = tl.load(firsts + t0)
        last = min(t0 + TOKENS, T) - 1
        end = tl.load(firsts + last) + tl.load(places + last) // SELECT + 1
        count = min(end - begin, width)
        _scores(
            q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, k_ptr + batch * stride_kb + kv_head * stride_kh,
            lse_ptr + batch * T * G * GROUP + kv_head * GROUP, firsts, room, stride_qt, stride_qh, stride_kt,
            t0, begin, end - 2, width, T, M, G * GROUP, scale,
            GROUP, D, BLOCK_D, RATIO, OVERLAP, SHIFT, TOKENS, PADDED_GROUP, BLOCK_J,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read what these have written

        first = tl.load(firsts + each, mask=each < T, other=0)
        own = tl.load(places + each, mask=each < T, other=0) // SELECT
        runs = tl.cdiv(count, RUN)
        suffices, found = False, tl.full([TOKENS], runs, tl.int32)
        if (count > BLOCK_S) & (count > TOP * RUN):
            free, until = tl.load(firsts + last) + 1 - begin, tl.load(places + t0) // SELECT - 1
            for c0 in range(0, count, BLOCK_C):
                column = c0 + tl.arange(0, BLOCK_C)[None, :]
                key = tl.minimum(tl.load(room + row * width + column), MOST)
                if (c0 < free) | (c0 + BLOCK_C > until):  # else all are free to be chosen by every token
                    key = keys(key, begin + column - first[:, None], own[:, None])
                peak = tl.max(tl.reshape(key, [TOKENS, BLOCK_C // RUN, RUN]), 2)
                tl.store(peak_room + row * peaks + c0 // RUN + tl.arange(0, BLOCK_C // RUN)[None, :], peak)
            tl.debug_barrier()
            best = tl.full([TOKENS, KEPT], -1, tl.int32)  # ascending
            for r0 in range(0, runs, BLOCK_S):
                run = r0 + tl.arange(0, BLOCK_S)[None, :]
                peak = tl.load(peak_room + row * peaks + run)
                best = merge_best(best, tl.where(run < runs, peak, -1), KEPT)
            least = tl.maximum(top_th(best, TOP, KEPT), 0)  # peaks below it are too small, or nobody's
            listed = tl.zeros([TOKENS], tl.int32)
            for r0 in range(0, runs, BLOCK_S):
                run = r0 + tl.arange(0, BLOCK_S)[None, :]
                peak = tl.load(peak_room + row * peaks + run)
                reaches = ((peak >= least) & (run < runs)).to(tl.int32)
                at = listed[:, None] + tl.cumsum(reaches, 1) - 1
                tl.store(short + row * SHORT + at, run, mask=(reaches != 0) & (at < SHORT))
                listed += tl.sum(reaches, 1)
            tl.debug_barrier()
            if tl.max(listed, 0) <= SHORT:
                suffices, found = True, listed
        length = tl.max(found, 0) * RUN

        best = tl.full([TOKENS, KEPT], -1, tl.int32)
        for c0 in range(0, length, BLOCK_S):
            _, key = look(room, short, c0, begin, first, own, found, width, suffices, TOKENS, SHORT, BLOCK_S, RUN)
            best = merge_best(best, key, KEPT)
        limit = top_th(best, TOP, KEPT)
        equals = TOP - tl.sum((best > limit).to(tl.int32), 1)  # so many of those at the limit, the earliest

        where = index_ptr + ((batch * T + each) * G + kv_head)[:, None] * TOP
        inside = (each < T)[:, None]
        taken = tl.zeros([TOKENS], tl.int32)
        for c0 in range(0, length, BLOCK_S):
            block, key = look(room, short, c0, begin, first, own, found, width, suffices, TOKENS, SHORT, BLOCK_S, RUN)
            above, equal = key > limit, (key == limit) & (key >= 0)
            both = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # two counts in one scan
            ranks, counts = tl.cumsum(both, 1), tl.sum(both, 1)
            above_rank, equal_rank = ranks & 0xFFFF, ranks >> 16
            at = taken[:, None] + above_rank + tl.minimum(equal_rank, equals[:, None]) - 1
            chosen = above | (equal & (equal_rank <= equals[:, None]))
            tl.store(where + at, block, mask=chosen & inside)
            taken += (counts & 0xFFFF) + tl.minimum(counts >> 16, equals)
            equals = tl.maximum(equals - (counts >> 16), 0)
        column = tl.arange(0, KEPT)[None, :]
        tl.store(where + column, -1, mask=(column >= taken[:, None]) & (column < TOP) & inside)
        tl.debug_barrier()  # the next item's scores take this one's place


@triton.jit
def _scores(
    q_ptr, k_ptr, lse_ptr, first_ptr, room, stride_qt, stride_qh, stride_kt, t0, begin, end, width, T, M, H, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    SHIFT: tl.constexpr, TOKENS: tl.constexpr, PADDED_GROUP: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The importance of the places [begin, end) of blocks for TOKENS tokens: room[token, place - begin], float32 bit by
    bit. Matrices are held transposed, (slots, rows): most of a group's sum is then a thread's own."""
    row = tl.arange(0, TOKENS * PADDED_GROUP)
    token, member = t0 + row // PADDED_GROUP, row % PADDED_GROUP
    inside = (token < T) & (member < GROUP)
    q = load_rows(q_ptr, token, member, stride_qt, stride_qh, inside, D, BLOCK_D)
    at = tl.cast(token, tl.int64) * H + member
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf")) * LOG2E  # inf: a padded row has p = 0
    each = tl.arange(0, TOKENS)
    if SHIFT:
        lowest = tl.load(first_ptr + t0 + each, mask=t0 + each < T, other=0) * RATIO
    for j0 in range(begin, end, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        score = tl.zeros([BLOCK_J, TOKENS], tl.float32)
        for o in tl.static_range(1 - OVERLAP, RATIO):
            weight = min(min(o + OVERLAP, RATIO - o), min(OVERLAP, RATIO))
            slot = j * RATIO + o - SHIFT
            k = load_rows(k_ptr, slot, slot * 0, stride_kt, 0, (slot >= 0) & (slot < M), D, BLOCK_D)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            p = tl.exp2(s - lse[None, :])  # blocks that a row doesn't see are dropped in `keys`
            p = tl.sum(tl.reshape(p, [BLOCK_J, TOKENS, PADDED_GROUP]), 2)
            if SHIFT:  # the first blocks' reach back beyond the document
                p = tl.where(slot[:, None] >= lowest[None, :], p, 0.0)
            score += weight * p
        column = (j - begin)[:, None]
        tl.store(room + each[None, :] * width + column, score.to(tl.int32, bitcast=True), mask=column < width)


# -------------------------------------------------------------------------------------------------------- the network


@triton.jit
def keys(score, block, own):
    """Keys order like importance, which is not negative; the first, own and previous block stand above all, those that
    are not the token's at -1. The free ones are 1 .. own - 2."""
    key = tl.where((block == 0) | (block >= own - 1), MOST + 1, tl.minimum(score, MOST))
    return tl.where((block >= 0) & (block <= own), key, -1)


@triton.jit
def look(
    room, short, c0, begin, first, own, found, width, suffices,
    TOKENS: tl.constexpr, SHORT: tl.constexpr, BLOCK_S: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """(block, key), (TOKENS, BLOCK_S): the runs of the list from its place c0 / RUN on, or where it doesn't suffice of
    all runs. A token's blocks ascend; a key of -1: there is none."""
    at = c0 + tl.arange(0, BLOCK_S)[None, :]
    row = tl.arange(0, TOKENS)[:, None]
    there = at // RUN < found[:, None]
    run = tl.load(short + row * SHORT + at // RUN, mask=there & suffices, other=0)
    column = tl.where(suffices, run, tl.where(there, at // RUN, 0)) * RUN + at % RUN
    block = begin + column - first[:, None]
    key = keys(tl.load(room + row * width + column), block, own[:, None])
    return block, tl.where(there, key, -1)


@triton.jit
def top_th(best, TOP: tl.constexpr, KEPT: tl.constexpr):
    """The TOP-th largest of `best`, ascending: (TOKENS, 1)."""
    return tl.sum(tl.where(tl.arange(0, KEPT)[None, :] == KEPT - TOP, best, 0), 1)[:, None]


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def merge_best(best, key, KEPT: tl.constexpr):
    """The KEPT best of `best`, ascending, and of the rows of `key`: tl.topk's network, at half its instructions."""
    BITS: tl.constexpr = _log2(KEPT)
    ROWS: tl.constexpr = _log2(key.shape[0])
    COLUMNS: tl.constexpr = _log2(key.shape[1])
    x = tl.reshape(key, [2] * (ROWS + COLUMNS))
    for stage in tl.static_range(1, BITS + 1):
        x = _sort_stage(x, ROWS + COLUMNS, stage, stage == COLUMNS)
    for i in tl.static_range(COLUMNS - BITS):
        x = tl.max(x, ROWS + COLUMNS - i - BITS - 1)  # ascending against descending: the best of both
        x = _sort_stage(x, ROWS + COLUMNS - i - 1, BITS, i + 1 == COLUMNS - BITS)
    x = tl.maximum(tl.reshape(best, [2] * (ROWS + BITS)), x)
    for i in tl.static_range(BITS):
        x = _exchange(x, ROWS + BITS, BITS - 1 - i, 0)
    return tl.reshape(x, best.shape)


@triton.jit
def _sort_stage(x, BITS: tl.constexpr, stage: tl.constexpr, LAST: tl.constexpr):
    """Bitonic runs of 2^stage to sorted ones: by turns ascending and descending, or, the last, descending."""
    for i in tl.static_range(stage):
        if LAST:
            x = _exchange(x, BITS, stage - 1 - i, 1)
        else:
            x = _exchange(x, BITS, stage - 1 - i, _bit(BITS, stage))
    return x


@triton.jit
def _exchange(x, BITS: tl.constexpr, i: tl.constexpr, descending):
    """Of each pair along the i-th innermost of 2 x 2 x ..., the smaller one first, or where descending the larger."""
    other = x ^ tl.xor_sum(x, BITS - 1 - i, keep_dims=True)
    return tl.where((descending ^ _bit(BITS, i)) != 0, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _bit(BITS: tl.constexpr, i: tl.constexpr):
    """Index along the i-th innermost of 2 x 2 x ..."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - i - 1) + [2] + [1] * i)
