"""What the choice of blocks (zoo/kernels/nsa_compressed.py) sorts by, and the network that sorts."""

import triton
import triton.language as tl

MOST = tl.constexpr(0x7FFFFFFE)  # as a key: importance is at most that, the bits of a float and not more


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
