"""Triton kernels and their launchers. Launchers take tensors that `zoo.ops` has checked; nothing here knows autograd.

Importing this package does not import triton: `zoo.ops.backend` imports a kernel module when a call first needs it.
"""

EPS = 1e-3  # of the gate's divisor: in the authors' code, not in the paper's formula (SPEC.md 1.3)
