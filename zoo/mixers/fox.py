"""Forgetting Transformer (Lin et al., arXiv 2503.02130): full causal attention whose past fades by a learned gate.

With the amplitude learned (SPEC.md 1.3) it is GatedFWA without a window; beta = 1 gives the original f = sigmoid(z).
"""

from dataclasses import dataclass

from zoo.mixers.attention import Attention, AttentionConfig, Gate
from zoo.mixers.base import Dims
from zoo.registry import mixers


@mixers.register("fox")
class FoX(Attention):
    @dataclass
    class Config(AttentionConfig):
        token_shift: bool = True
        gate_bias: float = 0.0
        gate_amplitude: float = 0.0

    def __init__(self, config: Config, dims: Dims):
        gate = Gate(dims, config.gate_bias, config.gate_amplitude)
        super().__init__(config, dims, window=None, gate=gate)
