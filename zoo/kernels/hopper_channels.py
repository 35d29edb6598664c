"""Producer and consumers of the Hopper backward kernels: the rings between them, and the products on what they pass."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import TILE


@aggregate
class Channels:
    """Shared memory between producer and consumers, and the barriers that guard it.

    `held` and `held_too` stay with a consumer for an item (q and dout, or k and v); `passing` and `passing_too` go by
    (k and v, or q and dout) with `columns`, which the tensor core adds to the logits.
    """

    held: gl.shared_memory_descriptor
    held_too: gl.shared_memory_descriptor
    passing: gl.shared_memory_descriptor
    passing_too: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    held_ready: gl.shared_memory_descriptor
    held_free: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, held, held_too, passing, passing_too, columns, held_ready, held_free, ready, free):
        self.held = held
        self.held_too = held_too
        self.passing = passing
        self.passing_too = passing_too
        self.columns = columns
        self.held_ready = held_ready
        self.held_free = held_free
        self.ready = ready
        self.free = free

    @gluon.jit
    def pass_on(self, ring):
        """Hands the tile in this slot back unseen. Waits first: an early arrival would count for its predecessor."""
        mbarrier.wait(self.ready.index(ring.slot), ring.parity)
        mbarrier.arrive(self.free.index(ring.slot), count=1)
        return ring.next()


@gluon.jit
def open_channels(held_desc, passing_desc, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    dtype: gl.constexpr = held_desc.dtype
    D: gl.constexpr = held_desc.block_type.shape[3]
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    channels = Channels(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], held_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, TILE, 1, D], held_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], passing_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, D], passing_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], gl.NVMMASharedLayout(32, 16, 2)),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(channels.held_ready.index(c), count=1)
        mbarrier.init(channels.held_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(channels.ready.index(s), count=1)
        mbarrier.init(channels.free.index(s), count=CONSUMERS)
    return channels


@gluon.jit
def load_held(channels, c: gl.constexpr, desc, desc_too, where, parity):
    nbytes: gl.constexpr = 2 * desc.block_type.nbytes
    mbarrier.wait(channels.held_free.index(c), parity ^ 1)
    mbarrier.expect(channels.held_ready.index(c), nbytes)
    tma.async_copy_global_to_shared(desc, where, channels.held_ready.index(c), channels.held.index(c))
    tma.async_copy_global_to_shared(desc_too, where, channels.held_ready.index(c), channels.held_too.index(c))


@gluon.jit
def load_passing(channels, ring, desc, desc_too, where):
    """Once the slot is free. `announce` must follow."""
    ready = channels.ready.index(ring.slot)
    mbarrier.wait(channels.free.index(ring.slot), ring.parity ^ 1)
    tma.async_copy_global_to_shared(desc, where, ready, channels.passing.index(ring.slot))
    tma.async_copy_global_to_shared(desc_too, where, ready, channels.passing_too.index(ring.slot))


@gluon.jit
def announce(channels, ring, desc):
    """The slot is ready when the bytes of both tiles have come; what was written to it before this call, at once."""
    nbytes: gl.constexpr = 2 * desc.block_type.nbytes
    mbarrier.expect(channels.ready.index(ring.slot), nbytes)


@gluon.jit
def as_operand(tile, D: gl.constexpr, A_SHARED: gl.constexpr, layout: gl.constexpr):
    """A resident left-hand side: in registers where they suffice, which halves the reads from shared memory."""
    if A_SHARED:
        return tile.reshape([TILE, D])
    else:
        return tile.reshape([TILE, D]).load(layout)


@gluon.jit
def score(a, tile, D: gl.constexpr, ones, columns, ADD: gl.constexpr, layout: gl.constexpr):
    """a tile^T (+ ones columns^T), (64, 64), in flight."""
    s = gl.zeros([TILE, TILE], gl.float32, layout)
    b = tile.reshape([TILE, D]).permute((1, 0))
    if ADD:
        s = warpgroup_mma(ones, columns.permute((1, 0)), s, use_acc=False, is_async=True)
        return warpgroup_mma(a, b, s, is_async=True)
    else:
        return warpgroup_mma(a, b, s, use_acc=False, is_async=True)
