"""Triton kernels and their launchers. Launchers take tensors that `zoo.ops` has checked; nothing here knows autograd.

Importing this package does not import triton: `zoo.ops.backend` imports a kernel module when a call first needs it.
"""

EPS = 1e-3  # of the gate's divisor: in the authors' code, not in the paper's formula (SPEC.md 1.3)

# Of pruning (zoo/ops/prune.py)
KEPT_TILE = 64  # positions that are kept or dropped together
UNITS = 1 << 20  # of a nat: what gates forget is counted in whole ones, so that sums are exact and have no order
FORGOTTEN = 1 << 16  # nats at most that a tile counts as having forgotten: 2^25 tiles fit in 62 bits
ROUNDING = 1 + 1e-4  # enlarges what must be forgotten: more than float32 errs in norms and in sums of a tile
