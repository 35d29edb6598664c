"""Between nats and bits: kernels compute powers of two, since exp takes four instructions more."""

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
