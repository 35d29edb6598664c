"""What the Hopper kernels share: rings of buffers, who works on which rows, the gate's bias for the tensor core.

Gluon, sm_90 only. Shapes as in zoo/kernels/window.py: B batch, T queries, N keys (the queries are the last T of them),
H query heads, G key heads, D head dim. Positions are absolute. A tile is 64 of them and starts at a multiple of 64, for
queries too, so that a tile of rows meets itself on the diagonal and lies in one chunk of the gate's prefix.

The gate is what zoo/kernels/gate.py leaves: suffix_j, the sum over (j, end of j's chunk], and each chunk's total, both
in log2 units. The bias of key j for all rows of an item is suffix_j plus the totals of the chunks after j's, up to an
anchor chunk. It is off by a constant per row, which `load_row_bias` tells.
"""

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from zoo.kernels.tiles import CHUNK

TILE = gl.constexpr(64)  # rows of a warpgroup, keys of a step
TILES_PER_CHUNK = gl.constexpr(CHUNK // 64)
NOTHING = gl.constexpr(-1.0e30)  # the maximum of no logits; finite, so that a masked logit minus it is still -inf
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
    queries: gl.tensor
    keys: gl.tensor
    window: gl.tensor
    blocks: gl.tensor  # items per head
    items: gl.tensor
    starts: gl.tensor  # (B, N) int32: first valid key of each position; read where BOUNDED
    firsts: gl.tensor  # (B, G, tiles) int32: first key tile that each tile keeps; read where PRUNED
    suffix: gl.tensor  # (B, H, N) fp32; read where GATED
    total: gl.tensor  # (B, H, chunks) fp32; read where GATED
    CONSUMERS: gl.constexpr
    D: gl.constexpr
    GROUP: gl.constexpr  # query heads per key head
    GATED: gl.constexpr
    BOUNDED: gl.constexpr
    PRUNED: gl.constexpr
    A_SHARED: gl.constexpr  # the resident operands stay in shared memory instead of registers

    @gluon.constexpr_function
    def __init__(self, batches, heads, queries, keys, window, blocks, items, starts, firsts, suffix, total,
                 CONSUMERS, D, GROUP, GATED, BOUNDED, PRUNED, A_SHARED):  # fmt: skip
        self.batches = batches
        self.heads = heads
        self.queries = queries
        self.keys = keys
        self.window = window
        self.blocks = blocks
        self.items = items
        self.starts = starts
        self.firsts = firsts
        self.suffix = suffix
        self.total = total
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.D = gl.constexpr(D)
        self.GROUP = gl.constexpr(GROUP)
        self.GATED = gl.constexpr(GATED)
        self.BOUNDED = gl.constexpr(BOUNDED)
        self.PRUNED = gl.constexpr(PRUNED)
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
    def kept(self, base, tile, batch, kv_head):
        """The entry of `tile` in a key head's row of `firsts` (or of their mirror, lasts)."""
        row = batch * (self.heads // self.GROUP) + kv_head
        return gl.load(base + row.to(gl.int64) * ((self.keys + TILE - 1) // TILE) + tile)

    @gluon.jit
    def oldest(self, tile, batch, head):
        """The oldest key tile that the first row of `tile` sees."""
        position = tile * TILE
        first = gl.maximum(position - self.window + 1, 0)
        if self.BOUNDED:
            start = gl.load(self.starts + batch.to(gl.int64) * self.keys + gl.minimum(position, self.keys - 1))
            first = gl.minimum(gl.maximum(first, start), position)  # rows before their own start still take one tile
        first = first // TILE
        if self.PRUNED:
            first = gl.maximum(first, self.kept(self.firsts, self.newest(tile), batch, head // self.GROUP))
        return gl.minimum(first, self.newest(tile))

    @gluon.jit
    def gate_rows(self, batch, head):
        """Where a head's suffixes and totals begin."""
        row = (batch * self.heads + head).to(gl.int64)
        chunks = (self.keys + TILE * TILES_PER_CHUNK - 1) // (TILE * TILES_PER_CHUNK)
        return self.suffix + row * self.keys, self.total + row * chunks

    @gluon.jit
    def load_suffix(self, batch, head, tile, layout: gl.constexpr):
        """(64,) suffixes of a tile, 0 outside the keys; and what the carry gains from the tile after it to this one."""
        suffix, total = self.gate_rows(batch, head)
        position = tile * TILE + gl.arange(0, TILE, layout=layout)
        inside = (position >= 0) & (position < self.keys)
        gain = gl.load(total + (tile + 1) // TILES_PER_CHUNK, mask=(tile + 1) % TILES_PER_CHUNK == 0, other=0.0)
        return gl.load(suffix + position, mask=inside, other=0.0), gain

    @gluon.jit
    def rows_stride(self):
        """Between the planes of the backward's per-row scratch (3, B, H, T)."""
        return (self.batches * self.heads).to(gl.int64) * self.queries

    @gluon.jit
    def load_row_bias(self, tile, newest, batch, head, AHEAD: gl.constexpr, layout: gl.constexpr):
        """What a key at each row's own position gets as bias when the anchor is the chunk of tile `newest`, at most
        AHEAD tiles on: the sum of the two, left to the caller, so that nobody waits for them before it needs them."""
        gl.static_assert(AHEAD <= TILES_PER_CHUNK)
        suffix = gl.zeros([TILE], gl.float32, layout)
        newer = gl.to_tensor(0.0)
        if self.GATED:
            suffixes, total = self.gate_rows(batch, head)
            position = tile * TILE + gl.arange(0, TILE, layout=layout)
            suffix = gl.load(suffixes + position, mask=position < self.keys, other=0.0)
            if AHEAD > 0:
                chunk = tile // TILES_PER_CHUNK + 1
                newer = gl.load(total + chunk, mask=chunk <= newest // TILES_PER_CHUNK, other=0.0)
        return suffix, newer

    @gluon.jit
    def first_visible(self, batch, position):
        """The oldest key that each row sees of the tiles that it keeps, and the latest of the rows' starts."""
        first = position - self.window + 1
        latest = gl.to_tensor(0)
        if self.BOUNDED:
            starts = self.starts + batch.to(gl.int64) * self.keys
            start = gl.load(starts + position, mask=position < self.keys, other=0)
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
    """(64, 64) mask of the key tile that starts at `first`. Two comparisons an element cost the forward no registers;
    one unsigned comparison, as in dk/dv, does."""
    key = first + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, layout)), 0)
    return (key <= gl.expand_dims(position, 1)) & (key >= gl.expand_dims(first_visible, 1))


@gluon.jit
def lane_sum(x, N: gl.constexpr):
    """(64, N) accumulator -> (64, 4): each of the four lanes that share a row adds what it holds; none asks another."""
    return gl.sum(gl.sum(gl.reshape(x, [TILE, N // 8, 4, 2]), 3), 1)


@gluon.jit
def send(value, tile, desc, base, problem, batch, first_row, head):
    """Rows first_row .. first_row + 63 of a head of a contiguous (B, T, H, D), by way of `tile`, which the copy reads
    until tma.store_wait. Rows outside 0 .. T - 1 are dropped."""
    D: gl.constexpr = value.shape[1]
    if first_row >= 0:
        tma.store_wait(0)
        tile.reshape([TILE, D]).store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [batch, first_row, head, 0], tile)
    else:  # a copy may end outside its tensor, but when it writes it may not begin there
        row = first_row + gl.arange(0, TILE, layout=gl.SliceLayout(1, value.type.layout))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, value.type.layout))
        at = ((batch.to(gl.int64) * problem.queries + row) * problem.heads + head) * D
        inside = gl.expand_dims((row >= 0) & (row < problem.queries), 1)
        gl.store(base + gl.expand_dims(at, 1) + gl.expand_dims(column, 0), value, mask=inside)


@dataclass(frozen=True)
class Schedule:
    """How a kernel's work is spread: warpgroups of 64 rows, slots in the ring of passing tiles, and whether what stays
    with a consumer for an item is read from shared memory or held in registers. Registers are a thread's."""

    consumers: int
    stages: int
    in_shared: bool
    consumer_registers: int
    producer_registers: int

    @property
    def registers_at_launch(self) -> int:
        return (self.consumers * self.consumer_registers + self.producer_registers) // (self.consumers + 1)


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    """Bulk copies of (1, 64, 1, D) boxes of (B, T, H, D). Reads outside give zeros."""
    block = [1, 64, 1, x.shape[3]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(x.dtype, x.shape[3]))


@functools.cache
def _layout(dtype: torch.dtype, dim: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 64, 1, dim], ELEMENTS[dtype])


def copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the copy engine can't read it: rows must be contiguous, everything else at 16 bytes."""
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, which takes the host 3 microseconds more."""
    return -(-a // b)


def programs(x: torch.Tensor) -> int:
    """One persistent program per multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def pointers(bounds: tuple[torch.Tensor, torch.Tensor] | None, unread: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both of `bounds` as a kernel takes them, or twice what it never reads."""
    return (unread, unread) if bounds is None else tuple(x.contiguous() for x in bounds)
