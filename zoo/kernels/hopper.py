"""What the Hopper kernels share: rings of buffers, who works on which rows, the gate's bias for the tensor core.

Gluon, sm_90 only. Letters as everywhere: B batch, T queries, S keys (the queries are the last T positions), H query
heads, G key heads, D head dim. A tile is 64 positions; tiles start at multiples of 64 of the key axis, so a tile is
also a chunk of the gate's prefix and row blocks start at a tile even where T != S or T is no multiple of 64.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

TILE = gl.constexpr(64)  # rows of a warpgroup, keys of a step, keys between two restarts of the gate's prefix
NOTHING = gl.constexpr(-1.0e30)  # the maximum of no logits; finite, so that a masked logit minus it is still -inf
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@aggregate
class Ring:
    """A place in a ring of barriers: the slot, and the parity that its barrier completes this time round."""

    slot: gl.tensor
    parity: gl.tensor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, slot, parity, SLOTS):
        self.slot = slot
        self.parity = parity
        self.SLOTS = gl.constexpr(SLOTS)

    @gluon.jit
    def next(self):
        wraps = self.slot + 1 == self.SLOTS
        return Ring(gl.where(wraps, 0, self.slot + 1), gl.where(wraps, self.parity ^ 1, self.parity), self.SLOTS)


@gluon.jit
def start_ring(SLOTS: gl.constexpr):
    return Ring(gl.to_tensor(0), gl.to_tensor(0), SLOTS)


@aggregate
class Problem:
    """Sizes of one launch; which rows an item holds and which key tiles they see."""

    batches: gl.tensor
    heads: gl.tensor
    group: gl.tensor  # query heads per key head
    queries: gl.tensor
    keys: gl.tensor
    window: gl.tensor
    blocks: gl.tensor  # items per head
    items: gl.tensor
    starts: gl.tensor  # (B, S) int32: first valid key of each position; read where STARTS
    gate: gl.tensor  # (B, H, S) fp32, log2 units, restarting every 64 keys; read where GATED
    CONSUMERS: gl.constexpr
    D: gl.constexpr
    GATED: gl.constexpr
    STARTS: gl.constexpr
    A_SHARED: gl.constexpr  # the resident operands stay in shared memory instead of registers

    @gluon.constexpr_function
    def __init__(self, batches, heads, group, queries, keys, window, blocks, items, starts, gate,
                 CONSUMERS, D, GATED, STARTS, A_SHARED):  # fmt: skip
        self.batches = batches
        self.heads = heads
        self.group = group
        self.queries = queries
        self.keys = keys
        self.window = window
        self.blocks = blocks
        self.items = items
        self.starts = starts
        self.gate = gate
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.D = gl.constexpr(D)
        self.GATED = gl.constexpr(GATED)
        self.STARTS = gl.constexpr(STARTS)
        self.A_SHARED = gl.constexpr(A_SHARED)

    @gluon.jit
    def locate(self, item):
        """Batch row, head, first tile of the item."""
        row = item // self.blocks
        first = (self.keys - self.queries) // TILE + item % self.blocks * self.CONSUMERS
        return row // self.heads, row % self.heads, first

    @gluon.jit
    def newest(self, tile):
        """The newest key tile that row tile `tile` sees: itself, or the last there is."""
        return gl.minimum(tile, (self.keys - 1) // TILE)

    @gluon.jit
    def oldest(self, tile, batch):
        """The oldest key tile that the first row of `tile` sees."""
        position = tile * TILE
        first = gl.maximum(position - self.window + 1, 0)
        if self.STARTS:
            start = gl.load(self.starts + batch.to(gl.int64) * self.keys + gl.minimum(position, self.keys - 1))
            first = gl.minimum(gl.maximum(first, start), position)  # rows before their own start still take one tile
        return gl.minimum(first // TILE, self.newest(tile))

    @gluon.jit
    def gate_row(self, batch, head):
        return self.gate + (batch * self.heads + head).to(gl.int64) * self.keys

    @gluon.jit
    def rows_stride(self):
        """Between the two planes of the backward's per-row scratch (2, B, H, T)."""
        return (self.batches * self.heads).to(gl.int64) * self.queries

    @gluon.jit
    def own_bias(self, tile, newest, batch, head, position, AHEAD: gl.constexpr):
        """What a key at each row's own position would get as bias: -U there, from the start of chunk `newest`."""
        row = self.gate_row(batch, head)
        bias = -gl.load(row + position, mask=position < self.keys, other=0.0)
        for i in gl.static_range(AHEAD):
            bias += gl.load(row + (tile + i) * TILE + TILE - 1, mask=tile + i < newest, other=0.0)
        return bias

    @gluon.jit
    def first_visible(self, batch, position):
        """The oldest key that each row sees, and the latest of the rows' starts."""
        first = position - self.window + 1
        latest = gl.to_tensor(0)
        if self.STARTS:
            at = self.starts + batch.to(gl.int64) * self.keys + position
            start = gl.load(at, mask=position < self.keys, other=0)
            first = gl.maximum(first, start)
            latest = gl.max(start, 0)
        return first, latest


@gluon.jit
def split_in_three(x):
    """fp32 as the sum of three bf16: 24 bits of mantissa, so nothing is lost on the way through the tensor core."""
    high = x.to(gl.bfloat16)
    rest = x - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    return high, middle, (rest - middle.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def bias_columns(bias, layout: gl.constexpr):
    """(64,) fp32 -> (64, 16) bf16: its three pieces in columns 0, 1, 2. Times a row of ones it is the bias again."""
    high, middle, low = split_in_three(bias)
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, layout)), 0)
    columns = gl.full([TILE, 16], 0.0, gl.bfloat16, layout)
    columns = gl.where(column == 2, gl.expand_dims(low, 1), columns)
    columns = gl.where(column == 1, gl.expand_dims(middle, 1), columns)
    return gl.where(column == 0, gl.expand_dims(high, 1), columns)


@gluon.jit
def visible(first, position, first_visible, layout: gl.constexpr):
    """(64, 64) mask of the key tile that starts at `first`."""
    key = first + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, layout)), 0)
    return (key <= gl.expand_dims(position, 1)) & (key >= gl.expand_dims(first_visible, 1))


@gluon.jit
def lane_sum(x, N: gl.constexpr):
    """(64, N) accumulator -> (64, 4): each of the four lanes that share a row adds what it holds; none asks another."""
    return gl.sum(gl.sum(gl.reshape(x, [TILE, N // 8, 4, 2]), 3), 1)


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Bulk copies of (1, rows, 1, D) boxes of (B, T, H, D). Reads outside give zeros, writes outside are dropped."""
    block = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
