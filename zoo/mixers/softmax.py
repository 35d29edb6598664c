"""Full causal softmax attention: every token sees all before it. State grows with the sequence."""

from dataclasses import dataclass

from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import Dims
from zoo.registry import mixers


@mixers.register("softmax")
class Softmax(Attention):
    @dataclass
    class Config(AttentionConfig):
        pass

    def __init__(self, config: Config, dims: Dims):
        super().__init__(config, dims, window=None, gate=None)
