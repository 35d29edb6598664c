"""GatedFWA (Liu et al., arXiv 2512.07782): sliding-window attention whose memory contracts by a learned gate.

    M_t = e^{-alpha_t} M_{t-1} + (1/w) (phi(k_t)^T v_t - e^{B_{t,t-w}} phi(k_{t-w})^T v_{t-w})      (SPEC.md 1.2)

computed as softmax attention over the last `window` keys with logits q_t.k_j / sqrt(D) - (alpha_{j+1} + ... + alpha_t).
Time is linear in T, the state a ring of `window` keys, values and decays.
"""

from dataclasses import dataclass

from zoo.mixers.attention import Attention, AttentionConfig, Gate, check_window
from zoo.mixers.base import Dims
from zoo.registry import mixers


@mixers.register("gatedfwa")
class GatedFWA(Attention):
    @dataclass
    class Config(AttentionConfig):
        """prune: the share of its probability that a token may lose to skipped tiles (zoo/ops/prune.py); null skips
        none. A call with a state skips none either, and flops counts all."""

        window: int = 512
        token_shift: bool = True
        gate_bias: float = 0.0
        gate_amplitude: float = 0.0
        prune: float | None = None

        def __post_init__(self):
            check_window(self.window)
            if self.prune is not None and not 0 < self.prune < 1:
                raise ValueError(f"prune = {self.prune}; it takes a number above 0 and below 1, or null")

    def __init__(self, config: Config, dims: Dims):
        gate = Gate(dims, config.gate_bias, config.gate_amplitude)
        super().__init__(config, dims, window=config.window, gate=gate)
        self.prune = config.prune
