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
def lane_sum(x, N: gl.constexpr):
    """(64, N) accumulator -> (64, 4): each of the four lanes that share a row adds what it holds; none asks another."""
    return gl.sum(gl.sum(gl.reshape(x, [TILE, N // 8, 4, 2]), 3), 1)


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Bulk copies of (1, rows, 1, D) boxes of (B, T, H, D). Reads outside give zeros, writes outside are dropped."""
    block = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
