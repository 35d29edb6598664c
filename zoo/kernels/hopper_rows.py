"""Rows of (token, query head) pairs on Hopper: what the kernels of NSA's branches share. Gluon, sm_90 only.

A row is a (token, query head) pair of one key/value head; 64 consecutive ones are a box of 64 / GROUP tokens and GROUP
heads, which the copy engine packs by itself. One warp produces by bulk copies, CONSUMERS warpgroups of 64 rows consume.
Barriers are counted: `number` is an item's place among those of its program.

Which tiles an item walks, and what its rows see of them, the geometry says: `Rows` here, `NearRows` in hopper_near.py.
Both have the fields tokens, groups, pairs, items, GROUP, D, CONSUMERS and TOKENS, and the functions walk, look, sight,
mask and keep_lse.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import ELEMENTS, TILE, start_ring
from zoo.kernels.nsa_compressed import STEP_ROWS
from zoo.kernels.units import LN2

HELD = gl.constexpr(2)  # places of a consumer for what stays: one item's is fetched while the other's is used


def takes(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether these kernels do such a call: rows of 64 / group tokens; a maximum that is taken before the scale; more
    than one step of decoding."""
    group = q.shape[2] // k.shape[2]
    return q.shape[0] * k.shape[1] > 0 and q.shape[1] * group > STEP_ROWS and 64 % group == 0 and scale > 0


# ------------------------------------------------------------------------------------------------ who sees what


@gluon.jit
def locate(rows, item):
    """(batch row, key/value head, first token); the latest tokens first, they see most."""
    pair = item % rows.pairs
    tile = (rows.items - 1 - item) // rows.pairs
    return pair // rows.groups, pair % rows.groups, tile * (rows.CONSUMERS * rows.TOKENS)


@aggregate
class Walk:
    """The tiles of an item: `count`, at least one, from key `begin` and then from key `then` on, without gaps."""

    begin: gl.tensor
    then: gl.tensor
    count: gl.tensor
    ragged: gl.tensor  # whether some row doesn't see all of the first one
    last_low: gl.tensor  # of the others all rows see all, between these two
    first_high: gl.tensor

    @gluon.constexpr_function
    def __init__(self, begin, then, count, ragged, last_low, first_high):
        self.begin = begin
        self.then = then
        self.count = count
        self.ragged = ragged
        self.last_low = last_low
        self.first_high = first_high

    @gluon.jit
    def tile(self, i):
        """The first key of the i-th."""
        return gl.where(i == 0, self.begin, self.then + (i - 1) * TILE)

    @gluon.jit
    def needs_mask(self, key0):
        """Of a tile after the first."""
        return (key0 < self.last_low) | (key0 + TILE > self.first_high)


@aggregate
class Rows:
    """Compressed attention's geometry: sizes of one launch, and which slots rows see. Keys are slots."""

    tokens: gl.tensor
    slots: gl.tensor
    groups: gl.tensor  # key/value heads
    pairs: gl.tensor  # of a batch row and a key/value head
    items: gl.tensor
    place: gl.tensor  # (B,T) int32
    first: gl.tensor  # (B,T) int32
    GROUP: gl.constexpr
    D: gl.constexpr
    BLOCK: gl.constexpr
    STRIDE: gl.constexpr
    RATIO: gl.constexpr
    CONSUMERS: gl.constexpr
    TOKENS: gl.constexpr  # of 64 rows

    @gluon.constexpr_function
    def __init__(self, tokens, slots, groups, pairs, items, place, first,
                 GROUP, D, BLOCK, STRIDE, RATIO, CONSUMERS):  # fmt: skip
        self.tokens = tokens
        self.slots = slots
        self.groups = groups
        self.pairs = pairs
        self.items = items
        self.place = place
        self.first = first
        self.GROUP = gl.constexpr(GROUP)
        self.D = gl.constexpr(D)
        self.BLOCK = gl.constexpr(BLOCK)
        self.STRIDE = gl.constexpr(STRIDE)
        self.RATIO = gl.constexpr(RATIO)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.TOKENS = gl.constexpr(64 // GROUP)

    @gluon.jit
    def look(self, batch, kv_head, token):
        """place and first_block of a token or tokens, as they lie in memory; beyond the last, the last one's."""
        at = batch * self.tokens + gl.minimum(token, self.tokens - 1)
        return gl.load(self.place + at), gl.load(self.first + at)

    @gluon.jit
    def low(self, first):
        return first * self.RATIO

    @gluon.jit
    def high(self, place, first):
        """One past the last slot that a token sees."""
        seen = gl.where(place + 1 >= self.BLOCK, (place + 1 - self.BLOCK) // self.STRIDE + 1, 0)
        return gl.minimum(first * self.RATIO + seen, self.slots)

    @gluon.jit
    def walk(self, item, batch, kv_head, token):
        """Of the item that begins at `token`; bounds never fall from token to token. Loaded anew for each item: Gluon
        forgets what a loop carries for an inner loop's bounds alone (docs/kernels.md)."""
        place, first = self.look(batch, kv_head, token)
        last_place, last_first = self.look(batch, kv_head, token + (self.CONSUMERS * self.TOKENS - 1))
        tile = self.low(first) // TILE
        count = gl.maximum((self.high(last_place, last_first) + (TILE - 1)) // TILE - tile, 1)
        begin, last_low, first_high = tile * TILE, self.low(last_first), self.high(place, first)
        ragged = (begin < last_low) | (begin + TILE > first_high)
        return Walk(begin, begin + TILE, count, ragged, last_low, first_high)

    @gluon.jit
    def sight(self, place, first):
        """[low, high) of tokens that were looked up."""
        return self.low(first), self.high(place, first)

    @gluon.jit
    def mask(self, s, key0, sight, layout: gl.constexpr):
        return mask_rows(s, key0, sight[0], sight[1], layout)

    @gluon.jit
    def numbers(self, batch, kv_head, token, row):
        """Where rows' numbers lie in a (B,T,H), and which of them exist. row: counted from `token`."""
        own = token + row // self.GROUP
        at = (batch.to(gl.int64) * self.tokens + own) * (self.groups * self.GROUP) + kv_head * self.GROUP
        return at + row % self.GROUP, own < self.tokens

    @gluon.jit
    def keep_lse(self, lse_ptr, batch, kv_head, token, row, lse):
        """lse is in log2, memory wants natural logs."""
        where, inside = self.numbers(batch, kv_head, token, row)
        gl.store(lse_ptr + where, lse * LN2, mask=inside)


@gluon.jit
def mask_rows(s, key0, low, high, layout: gl.constexpr):
    """s (rows, keys from key0 on) with -inf where a row doesn't see a key."""
    key = key0 + gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, layout)), 0)
    seen = (key >= gl.expand_dims(low, 1)) & (key < gl.expand_dims(high, 1))
    return gl.where(seen, s, float("-inf"))


# ------------------------------------------------------------------------------------------------ the channels


@aggregate
class Channels:
    """Shared memory between producer and consumers, and the barriers that guard it. `held` and `held_too` stay with a
    consumer for an item, HELD places each; `passing` and `passing_too` go by, dkv's with `columns`."""

    held: gl.shared_memory_descriptor
    held_too: gl.shared_memory_descriptor
    passing: gl.shared_memory_descriptor
    passing_too: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    held_ready: gl.shared_memory_descriptor
    held_free: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    PLACES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, held, held_too, passing, passing_too, columns, held_ready, held_free, ready, free, PLACES):
        self.held = held
        self.held_too = held_too
        self.passing = passing
        self.passing_too = passing_too
        self.columns = columns
        self.held_ready = held_ready
        self.held_free = held_free
        self.ready = ready
        self.free = free
        self.PLACES = gl.constexpr(PLACES)

    @gluon.jit
    def hold(self, c: gl.constexpr, number, desc, desc_too, where, BOTH: gl.constexpr):
        """Consumer c's operands of item `number`, once the item before the last has given its place up."""
        at = c * self.PLACES + number % self.PLACES
        nbytes: gl.constexpr = (2 if BOTH else 1) * desc.block_type.nbytes
        if self.PLACES == 2:  # given up when the next item begins, so the very first time is nobody's
            mbarrier.wait(self.held_free.index(at), ((number + 3) // 2) % 2)
        else:
            mbarrier.wait(self.held_free.index(at), (number + 1) % 2)
        mbarrier.expect(self.held_ready.index(at), nbytes)
        tma.async_copy_global_to_shared(desc, where, self.held_ready.index(at), self.held.index(at))
        if BOTH:
            tma.async_copy_global_to_shared(desc_too, where, self.held_ready.index(at), self.held_too.index(at))

    @gluon.jit
    def wait_held(self, C: gl.constexpr, number):
        at = C * self.PLACES + number % self.PLACES
        mbarrier.wait(self.held_ready.index(at), (number // self.PLACES) % 2)
        return at

    @gluon.jit
    def give_up_last(self, C: gl.constexpr, number):
        """The place of the item before `number`: what it sent from there is on its way."""
        tma.store_wait(0)
        mbarrier.arrive(self.held_free.index(C * self.PLACES + (number + 1) % self.PLACES), count=1)

    @gluon.jit
    def fetch(self, ring, desc, desc_too, where):
        """Once the slot is free. `announce` must follow."""
        ready = self.ready.index(ring.slot)
        mbarrier.wait(self.free.index(ring.slot), ring.parity ^ 1)
        tma.async_copy_global_to_shared(desc, where, ready, self.passing.index(ring.slot))
        tma.async_copy_global_to_shared(desc_too, where, ready, self.passing_too.index(ring.slot))

    @gluon.jit
    def announce(self, ring, desc):
        nbytes: gl.constexpr = 2 * desc.block_type.nbytes
        mbarrier.expect(self.ready.index(ring.slot), nbytes)

    @gluon.jit
    def pass_on(self, ring):
        """Hands the tile in this slot back unseen. Waits first: an early arrival would count for its predecessor."""
        mbarrier.wait(self.ready.index(ring.slot), ring.parity)
        mbarrier.arrive(self.free.index(ring.slot), count=1)
        return ring.next()


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N of them, each for COUNT arrivals."""
    places = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(N):
        mbarrier.init(places.index(n), count=COUNT)
    return places


@gluon.jit
def open_channels(held_desc, passing_desc, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
                  BOTH: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """BOTH: two operands are held. COLUMNS: dkv's."""
    dtype: gl.constexpr = held_desc.dtype
    one: gl.constexpr = held_desc.block_type.shape
    other: gl.constexpr = passing_desc.block_type.shape
    N: gl.constexpr = CONSUMERS * PLACES
    held = gl.allocate_shared_memory(dtype, [N, one[0], one[1], one[2], one[3]], held_desc.layout)
    held_too = held
    if BOTH:
        held_too = gl.allocate_shared_memory(dtype, [N, one[0], one[1], one[2], one[3]], held_desc.layout)
    passing = gl.allocate_shared_memory(dtype, [STAGES, other[0], other[1], other[2], other[3]], passing_desc.layout)
    passing_too = gl.allocate_shared_memory(
        dtype, [STAGES, other[0], other[1], other[2], other[3]], passing_desc.layout
    )
    held_ready = barriers(N, 1)
    columns = held_ready
    if COLUMNS:
        columns = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], gl.NVMMASharedLayout(32, 16, 2))
    return Channels(
        held, held_too, passing, passing_too, columns, held_ready, barriers(N, 1), barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS), PLACES,
    )  # fmt: skip


@gluon.jit
def product(a, tile, D: gl.constexpr, layout: gl.constexpr):
    """a tile^T, (64, 64), in flight."""
    s = gl.zeros([TILE, TILE], gl.float32, layout)
    return warpgroup_mma(a, tile.reshape([TILE, D]).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def send(value, tile, desc, rows, batch, kv_head, token):
    """64 rows of a contiguous (B,T,H,D), by way of `tile`, which the copy reads until tma.store_wait."""
    tile.reshape([TILE, rows.D]).store(value)
    fence_async_shared()
    if token < rows.tokens:
        tma.async_copy_shared_to_global(desc, [batch, token, kv_head * rows.GROUP, 0], tile)


@gluon.jit
def produce(rows, channels, q_desc, too_desc, k_desc, v_desc, BOTH: gl.constexpr):
    """For the kernels whose rows stay: every item's rows, then its tiles of keys."""
    ring = start_ring(channels.passing.shape[0])
    number = gl.to_tensor(0)
    for item in range(gl.program_id(0), rows.items, gl.num_programs(0)):
        batch, kv_head, token = locate(rows, item)
        walk = rows.walk(item, batch, kv_head, token)
        CONSUMERS: gl.constexpr = rows.CONSUMERS
        for c in gl.static_range(CONSUMERS):
            where = [batch, token + c * rows.TOKENS, kv_head * rows.GROUP, 0]
            channels.hold(c, number, q_desc, too_desc, where, BOTH)
        for i in range(walk.count):
            channels.fetch(ring, k_desc, v_desc, [batch, walk.tile(i), kv_head, 0])
            channels.announce(ring, k_desc)
            ring = ring.next()
        number += 1


def packed(x: Tensor, group: int) -> TensorDescriptor:
    """Bulk copies of 64 rows of (B,T,H,D): 64 / group tokens of `group` heads."""
    block = [1, 64 // group, group, x.shape[3]]
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    )
