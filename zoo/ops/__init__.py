"""What people call on tensors: checked arguments, gradients, and the best back end for the device at hand.

Layout (B, T, H, D) everywhere. `window` counts the visible keys, the token's own included; None is full causal.
"""

from zoo.ops.decode import ring_attention
from zoo.ops.gate import log_decay
from zoo.ops.window import gated_window_attention, window_attention

__all__ = ["gated_window_attention", "log_decay", "ring_attention", "window_attention"]
