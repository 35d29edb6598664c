"""Sizes of stroke models: strokes_<mixer>_24k."""

from functools import partial
from typing import TYPE_CHECKING

from zoo import config
from zoo.registry import models

if TYPE_CHECKING:
    from zoo.model import ModelConfig


def strokes_model(mixer: str) -> "ModelConfig":
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    node = {"name": mixer} | ({"window": 16} if mixer in ("swa", "gatedfwa") else {})
    backbone = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "mixer": node}
    return config.build(ModelConfig, {"backbone": backbone, "head": {"name": "strokes"}})


for _mixer in ("softmax", "swa", "fox", "gatedfwa"):
    models.add(f"strokes_{_mixer}_24k", partial(strokes_model, _mixer))
