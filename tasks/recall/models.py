"""Sizes of recall models: recall_<mixer>_d<width>, in the form of Zoology's models.

Two layers and no MLP: a gated short convolution, which binds each value to the key before it, then the mixer under
test with one head. No positions, no token shift (the convolution does its work) and no norm of queries and keys.
"""

from functools import partial
from typing import TYPE_CHECKING

from zoo import config
from zoo.registry import mixers, models

if TYPE_CHECKING:
    from zoo.model import ModelConfig

WIDTHS = (32, 64, 128, 256)
# What a mixer gets of these, it gets where it has such a field. Gates begin open: there is something to remember
FIELDS = {"token_shift": False, "qk_norm": "none", "gate_bias": 4.0, "window": 64, "block": 16, "top": 4}


def recall_model(mixer: str, width: int) -> "ModelConfig":
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    known = mixers.get(mixer).Config.__dataclass_fields__
    backbone = {
        "width": width,
        "depth": 2,
        "heads": 1,
        "mixer": {"name": mixer, **{name: value for name, value in FIELDS.items() if name in known}},
        "pattern": f"baseconv, {mixer}",
        "mlp": "identity",
        "positions": "none",
    }
    return config.build(ModelConfig, {"backbone": backbone, "head": {"name": "recall", "dropout": 0.1}})


for _width in WIDTHS:
    for _mixer in mixers.names():
        models.add(f"recall_{_mixer}_d{_width}", partial(recall_model, _mixer, _width))
