"""GatedFWA in Native Sparse Attention (Liu et al., arXiv 2512.07782): the window branch forgets by a learned gate.

    near_t = sum_j softmax_j(q_t.k_j / sqrt(D) - (alpha_{j+1} + ... + alpha_t)) v_j   over the last `window` keys

The compressed and selected branches stay ungated (SPEC.md 5.4): the gate is neither compressed nor selected.
"""

from dataclasses import dataclass

from zoo.mixers.attention import Gate
from zoo.mixers.base import Dims
from zoo.mixers.nsa import NSA
from zoo.registry import mixers


@mixers.register("gatedfwa_nsa")
class GatedFWANSA(NSA):
    @dataclass
    class Config(NSA.Config):
        token_shift: bool = True
        gate_bias: float = 0.0
        gate_amplitude: float = 0.0

    def __init__(self, config: Config, dims: Dims):
        super().__init__(config, dims, gate=Gate(dims, config.gate_bias, config.gate_amplitude))
