"""Sliding-window attention: each token sees the last `window` tokens, itself included. State is a ring of that size."""

from dataclasses import dataclass

from zoo.mixers.attention import Attention, AttentionConfig, check_window
from zoo.mixers.base import Dims
from zoo.registry import mixers


@mixers.register("swa")
class SWA(Attention):
    @dataclass
    class Config(AttentionConfig):
        window: int = 512

        def __post_init__(self):
            check_window(self.window)

    def __init__(self, config: Config, dims: Dims):
        super().__init__(config, dims, window=config.window, gate=None)
