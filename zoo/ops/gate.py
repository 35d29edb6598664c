"""The gate: from two pre-activations per token and head to a log-decay (GatedFWA, SPEC.md 1.3)."""

from torch import Tensor

from zoo.kernels import EPS
from zoo.ops import reference


def log_decay(z: Tensor, u: Tensor, eps: float = EPS) -> Tensor:
    """How much of its memory a head keeps at each token, as a logarithm: g = -softplus(-beta z) / (beta + eps).

    z is the pre-activation and beta = 1 + elu(u) > 0 its sharpness: a larger z forgets less. beta = 1 (u = 0) is the
    Forgetting Transformer's log-sigmoid up to 1/(1 + eps); beta -> 0 resets the memory, -ln 2 / eps at most.

    z, u (B,T,H), any float dtype. Returns (B,T,H), <= 0, in float32 (float64 for float64 inputs). Plain PyTorch
    operations: differentiable twice, and fused by torch.compile. `gated_window_attention` does the same in its kernel.
    Raises ValueError when the shapes, dtypes or devices of z and u differ, or eps is not positive.
    """
    check_gate(z, u)
    if not eps > 0:
        raise ValueError(f"log_decay: eps is {eps}, it must be > 0")
    return reference.activate(z, u, eps)


def check_gate(z: Tensor, u: Tensor) -> None:
    """Raises ValueError unless z and u are two float tensors alike."""
    if z.shape != u.shape:
        raise ValueError(f"z has shape {tuple(z.shape)} and u {tuple(u.shape)}: both must be (B, T, H)")
    if z.dtype != u.dtype or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} and u {u.dtype}: both must be of one float dtype")
    if z.device != u.device:
        raise ValueError(f"z is on {z.device} and u on {u.device}: both must be on one device")
