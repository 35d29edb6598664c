"""Sizes of image models: image_<mixer>_<size>, tokenizers and classifiers."""

from functools import partial
from typing import TYPE_CHECKING, Any

from zoo import config
from zoo.registry import models

if TYPE_CHECKING:
    from tasks.image.classifier import ClassifierConfig
    from tasks.image.tokenizer import TokenizerConfig
    from zoo.model import ModelConfig

# Heads of 64, which the Hopper kernels take, but in the smallest
SIZES = {
    "1m": {"width": 128, "depth": 4, "heads": 4},
    "7m": {"width": 256, "depth": 8, "heads": 4},  # the size of the published MNIST models
    "20m": {"width": 384, "depth": 12, "heads": 6},
    "35m": {"width": 512, "depth": 12, "heads": 8},
}
WINDOWED: dict[str, Any] = {"window": 256}
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "swa": WINDOWED,
    "fox": {},
    "gatedfwa": WINDOWED,
    "gatedfwa_nsa": {**WINDOWED, "block": 32, "top": 8},
}


def image_model(mixer: str, size: str) -> "ModelConfig":
    """Rotary positions on two axes turn by row and column; their base suits sides of some tens of places."""
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    shape = {**SIZES[size], "rope_base": 100.0, "mixer": {"name": mixer, **MIXERS[mixer]}}
    if mixer == "gatedfwa_nsa":
        shape["kv_heads"] = 1
    return config.build(ModelConfig, {"backbone": shape, "head": {"name": "image"}})


def tokenizer(factor: int) -> "TokenizerConfig":
    from tasks.image.tokenizer import TokenizerConfig

    return TokenizerConfig(factor=factor)


def small_classifier() -> "ClassifierConfig":
    from tasks.image.classifier import ClassifierConfig

    return ClassifierConfig(layers=(1, 1, 1, 1), widths=(32, 64, 128, 256))


for _size in SIZES:
    for _mixer in MIXERS:
        models.add(f"image_{_mixer}_{_size}", partial(image_model, _mixer, _size))

for _factor in (2, 4, 8):
    models.add(f"image_tokenizer_f{_factor}", partial(tokenizer, _factor))
models.add("image_classifier_r18", "tasks.image.classifier:ClassifierConfig")
models.add("image_classifier_r10", small_classifier)
