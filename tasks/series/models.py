"""Sizes of series models: series_<mixer>_<size>, the same for every mixer but for the mixer itself."""

from functools import partial
from typing import TYPE_CHECKING

from zoo import config
from zoo.registry import models

if TYPE_CHECKING:
    from zoo.model import ModelConfig

# width, depth, heads; parameters of the backbone as the name says, roughly
SIZES = {
    "100k": {"width": 64, "depth": 2, "heads": 4},
    "1m": {"width": 128, "depth": 4, "heads": 4},
    "8m": {"width": 256, "depth": 8, "heads": 4},
}
WINDOW = 64  # patches; 512 values of 8 each, 6,144 of 96 each
MIXERS = ("softmax", "swa", "fox", "gatedfwa", "nsa", "gatedfwa_nsa")


def series_model(mixer: str, size: str) -> "ModelConfig":
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    node: dict[str, object] = {"name": mixer}
    if mixer not in ("softmax", "fox"):
        node["window"] = WINDOW
    shape: dict[str, object] = dict(SIZES[size])
    if mixer in ("nsa", "gatedfwa_nsa"):
        shape["kv_heads"] = 1
        node |= {"block": 16, "top": 4, "window": 32}
    return config.build(ModelConfig, {"backbone": {**shape, "mixer": node}, "head": {"name": "series"}})


for _size in SIZES:
    for _mixer in MIXERS:
        models.add(f"series_{_mixer}_{_size}", partial(series_model, _mixer, _size))
