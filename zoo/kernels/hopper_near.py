"""The near blocks of the selected branch on Hopper (sm_90), in Gluon: `_near` of zoo/kernels/nsa_selected.py.

The program is that of compressed attention (hopper_compressed.py), its tiles are blocks of 64 keys. Which ones an item
walks, and what its rows see of them, a small kernel has written down before (nsa_near.py): an item walks three or four
tiles, too few to wait for a list of chosen blocks at each.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from zoo.kernels.hopper_band import TILE, Schedule, copyable, descriptor, programs
from zoo.kernels.hopper_compressed import forward_program
from zoo.kernels.hopper_rows import Walk, mask_rows, packed
from zoo.kernels.nsa_near import WALK, walks
from zoo.kernels.nsa_piece import Piece
from zoo.kernels.units import LOG2E

# by head dim
NEAR = {64: Schedule(3, 4, True, 160, 32), 128: Schedule(3, 4, True, 160, 32)}
WALK_NUMBERS = gl.constexpr(WALK)


def takes(q: Tensor, k: Tensor, block: int, scale: float) -> bool:
    """Whether this kernel does such a call: a tile is a block, rows of 64 / group tokens, a maximum that is taken
    before the scale."""
    return block == 64 and k.shape[1] > 0 and 64 % (q.shape[2] // k.shape[2]) == 0 and scale > 0


@aggregate
class NearRows:
    """Sizes of one launch; which tiles an item walks and which keys its rows see."""

    tokens: gl.tensor
    groups: gl.tensor  # key/value heads
    pairs: gl.tensor  # of a batch row and a key/value head
    items: gl.tensor
    walks: gl.tensor  # (items, WALK) int32, as nsa_near.Walks
    queries: gl.tensor  # (4,B,G,T) int32, likewise
    lse_stride_b: gl.tensor
    lse_stride_t: gl.tensor
    GROUP: gl.constexpr
    D: gl.constexpr
    CONSUMERS: gl.constexpr
    TOKENS: gl.constexpr  # of 64 rows

    @gluon.constexpr_function
    def __init__(self, tokens, groups, pairs, items, walks, queries, lse_stride_b, lse_stride_t, GROUP, D, CONSUMERS):
        self.tokens = tokens
        self.groups = groups
        self.pairs = pairs
        self.items = items
        self.walks = walks
        self.queries = queries
        self.lse_stride_b = lse_stride_b
        self.lse_stride_t = lse_stride_t
        self.GROUP = gl.constexpr(GROUP)
        self.D = gl.constexpr(D)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.TOKENS = gl.constexpr(64 // GROUP)

    @gluon.jit
    def walk(self, item, batch, kv_head, token):
        at = self.walks + item * WALK_NUMBERS
        begin, then, count = gl.load(at), gl.load(at + 1), gl.load(at + 2)
        return Walk(begin, then, count, gl.load(at + 3) != 0, gl.load(at + 4), gl.load(at + 5))

    @gluon.jit
    def look(self, batch, kv_head, token):
        """Of a token or tokens; beyond the last, the last one's."""
        plane = self.pairs.to(gl.int64) * self.tokens
        pair = (batch * self.groups + kv_head).to(gl.int64)
        at = self.queries + pair * self.tokens + gl.minimum(token, self.tokens - 1)
        return gl.load(at), gl.load(at + plane), gl.load(at + 2 * plane), gl.load(at + 3 * plane)

    @gluon.jit
    def sight(self, first, first_high, low, high):
        return first, first_high, low, high

    @gluon.jit
    def mask(self, s, key0, sight, layout: gl.constexpr):
        """A tile shows a row either of its two ranges (nsa_near.py)."""
        later = key0 + TILE > sight[2]
        low, high = gl.where(later, sight[2], sight[0]), gl.where(later, sight[3], sight[1])
        return mask_rows(s, key0, low, high, layout)

    @gluon.jit
    def keep_lse(self, lse_ptr, batch, kv_head, token, row, lse):
        """In log2, as `_merge` wants it, to (B,T,H) of a piece."""
        own = token + row // self.GROUP
        at = batch.to(gl.int64) * self.lse_stride_b + own.to(gl.int64) * self.lse_stride_t + kv_head * self.GROUP
        gl.store(lse_ptr + at + row % self.GROUP, lse, mask=own < self.tokens)


@gluon.jit(do_not_specialize=["lse_stride_b", "lse_stride_t", "tokens", "groups", "pairs", "items"])
def near_kernel(
    q_desc, k_desc, v_desc, out_desc, walks, queries, lse, scale_log2, lse_stride_b, lse_stride_t,
    tokens, groups, pairs, items,
    GROUP: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    rows = NearRows(tokens, groups, pairs, items, walks, queries, lse_stride_b, lse_stride_t, GROUP, D, CONSUMERS)
    forward_program(
        rows, q_desc, k_desc, v_desc, out_desc, lse, scale_log2, STAGES, CONSUMER_REGISTERS, PRODUCER_REGISTERS
    )


def near_outputs(piece: Piece, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """As that of nsa_selected.py, of a call that `takes` accepts: writes to out, and to lse in log2. bf16 or fp16, D 64
    or 128. Keys that nobody sees yet must be finite: a tile is read to its end."""
    q, k, v = (copyable(x) for x in (q, k, v))
    plan, group = NEAR[piece.dim], piece.group
    table = walks(piece, plan.consumers * 64 // group)
    near_kernel[(min(table.items, programs(q)),)](
        packed(q, group), descriptor(k), descriptor(v), packed(out, group), table.item, table.query, lse,
        scale * LOG2E.value, lse.stride(0), lse.stride(1), q.shape[1], k.shape[2], table.pairs, table.items,
        group, piece.dim, plan.consumers, plan.stages, plan.consumer_registers, plan.producer_registers,
        num_warps=4, maxnreg=plan.registers_at_launch,
    )  # fmt: skip
