"""Sizes of text models: text_<mixer>_<size>, the same for every mixer but for the mixer itself."""

from functools import partial
from typing import TYPE_CHECKING

from zoo import config
from zoo.registry import mixers, models

if TYPE_CHECKING:
    from zoo.model import ModelConfig

# width, depth, heads, window; parameters without embedding as the name says, roughly
SIZES = {
    "1m": {"width": 128, "depth": 4, "heads": 4, "window": 128},
    "8m": {"width": 256, "depth": 8, "heads": 4, "window": 256},
    "10m": {"width": 384, "depth": 6, "heads": 6, "window": 128},  # the shape of nanoGPT's tiny Shakespeare model
    "125m": {"width": 768, "depth": 12, "heads": 12, "window": 512},  # the shape of GPT-2 small (SPEC.md 3.1)
}
# Of the sparse mixers: key/value heads (the 3 or 4 query heads of each choose their blocks together), tokens a block,
# and how many blocks a query reads in detail. The sizes for short contexts have smaller and fewer ones.
SPARSE = {
    "1m": {"kv_heads": 1, "block": 16, "top": 8},
    "8m": {"kv_heads": 1, "block": 32, "top": 8},
    "10m": {"kv_heads": 2, "block": 16, "top": 8},
    "125m": {"kv_heads": 3, "block": 64, "top": 16},
}
VOCABULARY = {"125m": 50304}  # GPT-2 words, padded; else 256 bytes. A task sets its own tokenizer's


def text_model(mixer: str, size: str) -> "ModelConfig":
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    shape = dict(SIZES[size])
    window = shape.pop("window")
    known = mixers.get(mixer).Config.__dataclass_fields__
    node = {"name": mixer} | ({"window": window} if "window" in known else {})
    if {"block", "top"} <= known.keys():
        sparse = dict(SPARSE[size])
        shape["kv_heads"] = sparse.pop("kv_heads")
        node |= sparse
    head = {"name": "text", "vocabulary": VOCABULARY.get(size, 256)}
    return config.build(ModelConfig, {"backbone": {**shape, "mixer": node}, "head": head})


for _size in SIZES:
    for _mixer in mixers.names():
        models.add(f"text_{_mixer}_{_size}", partial(text_model, _mixer, _size))
