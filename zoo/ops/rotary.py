"""The angles of rotary positions, as an operator (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor

from zoo.ops.stacking import stack_rows


def rotary_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, T, D/2) float32, of the angles position * base ** (-2 i / D) in radians.

    positions  (B, T) in tokens, or (B, T, A): with A axes the D/2 frequencies are dealt out evenly, axis after axis (in
               two dimensions as in arXiv 2403.13298), and `i` counts those of an axis, of D/A
    Computed in float64. No gradient. Raises ValueError where head_dim D is not a multiple of 2 A.
    """
    axes = 1 if positions.dim() == 2 else positions.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim {head_dim} is not a multiple of {2 * axes}, which {axes} rotary axes need")
    return _rotary_table(positions, head_dim, base)


# An operator, so that it is computed once: a compiler that sees what is inside repeats these float64 functions for
# every element of q and k, in each layer and again in its backward pass.
@torch.library.custom_op("zoo::rotary_table", mutates_args=())
def _rotary_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    axes = 1 if positions.dim() == 2 else positions.shape[-1]
    each = head_dim // (2 * axes)
    # float64, or the angle at position 1,000,000 is 0.06 off; an MPS device has no float64
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    frequency = base ** (-torch.arange(each, device=positions.device, dtype=wide) / each)
    angle = positions.reshape(*positions.shape[:2], axes, 1).to(wide) * frequency  # (B, T, A, D/2A)
    angle = angle.flatten(2)
    return angle.cos().float(), angle.sin().float()


@_rotary_table.register_fake
def _(positions, head_dim, base):
    cos, sin = (positions.new_empty((*positions.shape[:2], head_dim // 2), dtype=torch.float32) for _ in range(2))
    return cos, sin


stack_rows(_rotary_table)
