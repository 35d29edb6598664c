"""What people call on tensors: checked arguments, gradients, and the best back end for the device at hand.

Layout (B, T, H, D) everywhere. `window` counts the visible keys, the token's own included; None is full causal.
"""

from zoo.ops.backend import may_look
from zoo.ops.decode import ring_attention
from zoo.ops.gate import log_decay
from zoo.ops.linear import precise_linear, wide_linear
from zoo.ops.loss import linear_cross_entropy
from zoo.ops.mlp import mlp_in_pieces
from zoo.ops.norm import add_norm
from zoo.ops.nsa import compressed_attention, mix_branches, nsa_attention, selected_attention
from zoo.ops.nsa_blocks import gather_blocks, pool_blocks, runs_dense
from zoo.ops.qkv import attention_inputs
from zoo.ops.rotary import rotary_table
from zoo.ops.swiglu import swiglu
from zoo.ops.window import gated_window_attention, window_attention

__all__ = [
    "add_norm",
    "attention_inputs",
    "compressed_attention",
    "gated_window_attention",
    "gather_blocks",
    "linear_cross_entropy",
    "log_decay",
    "may_look",
    "mix_branches",
    "mlp_in_pieces",
    "nsa_attention",
    "pool_blocks",
    "precise_linear",
    "ring_attention",
    "rotary_table",
    "runs_dense",
    "selected_attention",
    "swiglu",
    "wide_linear",
    "window_attention",
]
