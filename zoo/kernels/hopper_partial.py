"""Queries against far blocks that they chose, on Hopper (sm_90), in Gluon: `_partial` of zoo/kernels/nsa_selected.py.

A pair's query rows, the GROUP heads of a token, lie together in memory, and so do those that it leaves in scratch: the
copy engine gathers and scatters them. A block's keys and values stay in shared memory; 64 / GROUP of its pairs are a
tile of 64 rows, of one softmax each, with no loop over keys and no mask: a far block is complete and all earlier.

Which pairs a program walks, zoo/kernels/nsa_runs.py has written down. One warp produces, CONSUMERS warpgroups take
tiles in turn, through runs and items: slot s of the ring is consumer s % CONSUMERS's.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import (
    ELEMENTS,
    NOTHING,
    TILE,
    Schedule,
    copyable,
    descriptor,
    lane_sum,
    programs,
    start_ring,
)
from zoo.kernels.hopper_rows import HELD, Channels, barriers, product
from zoo.kernels.nsa_inverse import sorted_pairs
from zoo.kernels.nsa_piece import Piece
from zoo.kernels.nsa_runs import ITEM, runs
from zoo.kernels.nsa_selected import scratch
from zoo.kernels.units import LOG2E

# by head dim; stages in all, a multiple of the consumers
PARTIAL = {64: Schedule(3, 9, True, 160, 32), 128: Schedule(3, 6, True, 160, 32)}
LEAST_GROUP = 8  # rows of a copy: as many as the pattern of shared memory repeats after
HALF = gl.constexpr(64)  # columns of a box: the width of that pattern
ITEM_NUMBERS = gl.constexpr(ITEM)


def takes(q: Tensor, k: Tensor, block: int, scale: float) -> bool:
    """Whether this kernel does such a call: a tile is a block, 64 rows are whole pairs, a maximum that is taken before
    the scale."""
    group = q.shape[2] // k.shape[2]
    return block == 64 and k.shape[1] > 0 and 64 % group == 0 and group >= LEAST_GROUP and scale > 0


@aggregate
class Pairs:
    """Which pairs there are, and what a launch walks."""

    order: gl.tensor  # int64, nsa_inverse.Sorted
    table: gl.tensor  # (items, ITEM) int32, nsa_runs.Runs
    begin: gl.tensor  # (runs + 1,) int32
    runs: gl.tensor
    tokens: gl.tensor  # of a batch row
    G: gl.constexpr
    TOP: gl.constexpr
    GROUP: gl.constexpr
    D: gl.constexpr
    CONSUMERS: gl.constexpr
    EACH: gl.constexpr  # pairs of a tile

    @gluon.constexpr_function
    def __init__(self, order, table, begin, runs, tokens, G, TOP, GROUP, D, CONSUMERS):
        self.order = order
        self.table = table
        self.begin = begin
        self.runs = runs
        self.tokens = tokens
        self.G = gl.constexpr(G)
        self.TOP = gl.constexpr(TOP)
        self.GROUP = gl.constexpr(GROUP)
        self.D = gl.constexpr(D)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.EACH = gl.constexpr(64 // GROUP)

    @gluon.jit
    def range(self, run):
        """[begin, end) items. Loaded anew for each run, and an item's pairs for each item: Gluon forgets what a loop
        carries for an inner loop's bounds alone (docs/kernels.md)."""
        return gl.load(self.begin + run), gl.load(self.begin + run + 1)

    @gluon.jit
    def span(self, item):
        """[first, last) of an item's pairs."""
        at = self.table + item * ITEM_NUMBERS
        return gl.load(at), gl.load(at + 1)

    @gluon.jit
    def block(self, item):
        """Batch row, key/value head and first key of an item's block."""
        at = self.table + item * ITEM_NUMBERS
        return gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)

    @gluon.jit
    def load(self, at, last):
        """The pairs of the tile at `at` in the order; in place of those beyond the item's last the first one again,
        which leaves the same once more."""
        EACH: gl.constexpr = self.EACH
        first = gl.load(self.order + at).to(gl.int32)
        pair = (first,)
        for j in gl.static_range(1, EACH):
            there = at + j < last
            later = gl.load(self.order + at + j, mask=there, other=0).to(gl.int32)
            pair = pair + (gl.where(there, later, first),)  # type: ignore[assignment]
        return pair

    @gluon.jit
    def rows(self, at, last, row):
        """Where the tile's rows lie in the scratch of (pairs, GROUP)."""
        own = row // self.GROUP
        pair = gl.load(self.order + gl.where(at + own < last, at + own, at)).to(gl.int32)
        return pair * self.GROUP + row % self.GROUP


@aggregate
class Tiles:
    """Queries that come and outputs that go, each as tiles of 64 rows and as what the copy engine takes: of a tile half
    after half of the columns, pair after pair."""

    boxes: gl.shared_memory_descriptor  # of channels.passing
    outs: gl.shared_memory_descriptor
    out_boxes: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, boxes, outs, out_boxes):
        self.boxes = boxes
        self.outs = outs
        self.out_boxes = out_boxes


@gluon.jit
def log2(x):
    """As the device has it, 2^-22 off; that of the library is forty instructions."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def partial_produce(pairs, channels, tiles, q_desc, k_desc, v_desc):
    EACH: gl.constexpr = pairs.EACH
    HALVES: gl.constexpr = pairs.D // HALF
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    for run in range(gl.program_id(0), pairs.runs, gl.num_programs(0)):
        begin, end = pairs.range(run)
        for item in range(begin, end):
            first, last = pairs.span(item)
            batch, kv_head, key0 = pairs.block(item)
            channels.hold(0, number, k_desc, v_desc, [batch, key0, kv_head, 0], True)
            for at in range(first, last, EACH):
                ready = channels.ready.index(ring.slot)
                pair = pairs.load(at, last)
                mbarrier.wait(channels.free.index(ring.slot), ring.parity ^ 1)
                mbarrier.expect(ready, EACH * HALVES * q_desc.block_type.nbytes)
                for j in gl.static_range(EACH):
                    for h in gl.static_range(HALVES):
                        box = tiles.boxes.index(ring.slot * (EACH * HALVES) + (h * EACH + j))
                        token = pair[j] // (pairs.G * pairs.TOP) - batch * pairs.tokens
                        where = [batch, token, kv_head * pairs.GROUP, h * HALF]
                        tma.async_copy_global_to_shared(q_desc, where, ready, box)
                ring = ring.next()
            number += 1


@gluon.jit
def partial_consume(C: gl.constexpr, pairs, channels, tiles, partial_desc, lse_ptr, scale_log2):
    """Warpgroup C: of all tiles of this program the C-th and every CONSUMERS-th from there."""
    D: gl.constexpr = pairs.D
    EACH: gl.constexpr = pairs.EACH
    CONSUMERS: gl.constexpr = pairs.CONSUMERS
    dtype: gl.constexpr = partial_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    row = gl.arange(0, TILE, layout=row_layout)
    ring = start_ring(channels.passing.shape[0] // CONSUMERS)
    number = gl.to_tensor(0)
    ahead = gl.to_tensor(C)  # tiles of others before this consumer's next
    for run in range(gl.program_id(0), pairs.runs, gl.num_programs(0)):
        begin, end = pairs.range(run)
        for item in range(begin, end):
            first, last = pairs.span(item)
            held = channels.wait_held(0, number)
            k = channels.held.index(held)
            v = channels.held_too.index(held).reshape([TILE, D])
            mbarrier.arrive(channels.held_free.index((number + 1) % HELD), count=1)  # the last item's
            count = (last - first + (EACH - 1)) // EACH
            for i in range((count - ahead + (CONSUMERS - 1)) // CONSUMERS):
                at = first + (ahead + i * CONSUMERS) * EACH  # asked for here too, or Gluon would forget `ahead`
                slot = ring.slot * CONSUMERS + C
                mbarrier.wait(channels.ready.index(slot), ring.parity)
                s = product(channels.passing.index(slot), k, D, s_layout)
                pair, own = pairs.load(at, last), pairs.rows(at, last, row)  # on their way meanwhile
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(channels.free.index(slot), count=1)
                ring = ring.next()
                m = gl.maximum(gl.max(s, 1) * scale_log2, NOTHING)
                p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
                total = log2(gl.convert_layout(gl.sum(lane_sum(p, 64), 1), row_layout))
                p = gl.convert_layout((p * gl.expand_dims(gl.exp2(-total), 1)).to(dtype), p_layout)
                o = gl.zeros([TILE, D], gl.float32, o_layout)
                o = warpgroup_mma(p, v, o, use_acc=False, is_async=True)
                gl.store(lse_ptr + own, m + total)
                o, p = warpgroup_mma_wait(0, deps=(o, p))
                o = gl.reshape(o.to(dtype), [EACH, pairs.GROUP, D // HALF, HALF])
                tma.store_wait(0)
                tiles.outs.index(C).store(gl.permute(o, (0, 2, 1, 3)))
                fence_async_shared()
                for j in gl.static_range(EACH):
                    tma.async_copy_shared_to_global(
                        partial_desc, [pair[j], 0, 0, 0], tiles.out_boxes.index(C * EACH + j)
                    )
            ahead = (ahead + CONSUMERS - count % CONSUMERS) % CONSUMERS
            number += 1
    tma.store_wait(0)


@gluon.jit
def open_tiles(pairs, q_desc, k_desc, partial_desc, STAGES: gl.constexpr):
    """(channels, tiles): of an item its block's keys and values, the same for all consumers."""
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = pairs.D
    CONSUMERS: gl.constexpr = pairs.CONSUMERS
    BOXES: gl.constexpr = pairs.EACH * (D // HALF)
    ROWS: gl.constexpr = pairs.GROUP
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    gl.static_assert(STAGES % CONSUMERS == 0)
    held = gl.allocate_shared_memory(dtype, [HELD, 1, TILE, 1, D], k_desc.layout)
    held_too = gl.allocate_shared_memory(dtype, [HELD, 1, TILE, 1, D], k_desc.layout)
    passing = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], layout)
    outs = gl.allocate_shared_memory(dtype, [CONSUMERS, pairs.EACH, D // HALF, ROWS, HALF], partial_desc.layout)
    boxes = passing._reinterpret(dtype, [STAGES * BOXES, 1, 1, ROWS, HALF], q_desc.layout)
    out_boxes = outs._reinterpret(dtype, [CONSUMERS * pairs.EACH, 1, D // HALF, ROWS, HALF], partial_desc.layout)
    held_ready, held_free = barriers(HELD, 1), barriers(HELD, CONSUMERS)
    ready, free = barriers(STAGES, 1), barriers(STAGES, 1)
    channels = Channels(held, held_too, passing, passing, held_ready, held_ready, held_free, ready, free, HELD)
    return channels, Tiles(boxes, outs, out_boxes)


@gluon.jit(do_not_specialize=["runs", "tokens"])
def partial_kernel(
    q_desc, k_desc, v_desc, partial_desc, order, table, begin, lse, scale_log2, runs, tokens,
    G: gl.constexpr, TOP: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    pairs = Pairs(order, table, begin, runs, tokens, G, TOP, GROUP, D, CONSUMERS)
    channels, tiles = open_tiles(pairs, q_desc, k_desc, partial_desc, STAGES)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (partial_consume, (0, pairs, channels, tiles, partial_desc, lse, scale_log2)),
            (partial_consume, (1, pairs, channels, tiles, partial_desc, lse, scale_log2)),
            (partial_produce, (pairs, channels, tiles, q_desc, k_desc, v_desc)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize([
            (partial_consume, (0, pairs, channels, tiles, partial_desc, lse, scale_log2)),
            (partial_consume, (1, pairs, channels, tiles, partial_desc, lse, scale_log2)),
            (partial_consume, (2, pairs, channels, tiles, partial_desc, lse, scale_log2)),
            (partial_produce, (pairs, channels, tiles, q_desc, k_desc, v_desc)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def far_outputs(piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As that of nsa_selected.py, of a call that `takes` accepts. bf16 or fp16, D 64 or 128."""
    q, k, v = (copyable(x) for x in (q, k, v))
    plan, group, width = PARTIAL[piece.dim], piece.group, programs(q)
    partial, lse = scratch(piece, q)
    pairs = sorted_pairs(piece, "partial")
    walk = runs(piece, pairs, width)
    partial_kernel[(width,)](
        pair_rows(q, group), descriptor(k), descriptor(v), scratch_rows(partial), pairs.order, walk.item,
        walk.begin, lse, scale * LOG2E.value, walk.count, q.shape[1],
        k.shape[2], piece.top, group, piece.dim, plan.consumers, plan.stages, plan.consumer_registers,
        plan.producer_registers, num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
    return partial, lse


def pair_rows(x: Tensor, group: int) -> TensorDescriptor:
    """Bulk copies of `group` heads of a token of (B,T,H,D), half of the columns at a time."""
    return _copies(x, [1, 1, group, HALF.value])


def scratch_rows(x: Tensor) -> TensorDescriptor:
    """Bulk copies of a pair of (pairs,GROUP,D), its halves one after the other."""
    pairs, group, dim = x.shape
    return _copies(
        x.view(pairs, group, dim // HALF.value, HALF.value).transpose(1, 2), [1, dim // HALF.value, group, HALF.value]
    )


def _copies(x: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
