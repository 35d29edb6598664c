"""Sizes of audio models: audio_<mixer>_<size> for samples and codes, music_<mixer>_<size>, codecs and classifiers."""

from functools import partial
from typing import TYPE_CHECKING, Any

from zoo import config
from zoo.registry import models

if TYPE_CHECKING:
    from zoo.model import ModelConfig

# width, depth, heads; parameters of the backbone as the name says, roughly. Heads of 64, which the Hopper kernels take,
# but in the two smallest, where they would be two or one
SIZES = {
    "100k": {"width": 64, "depth": 2, "heads": 2},
    "500k": {"width": 128, "depth": 2, "heads": 4},
    "1m": {"width": 128, "depth": 4, "heads": 4},
    "4m": {"width": 256, "depth": 5, "heads": 4},
    "8m": {"width": 256, "depth": 10, "heads": 4},
}
HEADS = {"audio": "audio_samples", "music": "music_notes"}
WINDOWS = {"audio": 256, "music": 128}
MIXERS = ("softmax", "swa", "fox", "gatedfwa", "nsa", "gatedfwa_nsa")


def audio_model(domain: str, mixer: str, size: str) -> "ModelConfig":
    from zoo.model import ModelConfig  # with torch, which a list of names does without

    window = WINDOWS[domain]
    node: dict[str, Any] = {"name": mixer}
    if mixer not in ("softmax", "fox"):
        node["window"] = window
    shape: dict[str, Any] = {**SIZES[size], "mixer": node}
    if mixer in ("nsa", "gatedfwa_nsa"):
        shape["kv_heads"] = 1
        node |= {"block": 32, "top": 8}
    return config.build(ModelConfig, {"backbone": shape, "head": {"name": HEADS[domain]}})


for _domain in HEADS:
    for _size in SIZES:
        for _mixer in MIXERS:
            models.add(f"{_domain}_{_mixer}_{_size}", partial(audio_model, _domain, _mixer, _size))
models.add("audio_codec_8khz", "tasks.audio.codec:CodecConfig")
models.add("audio_classifier_r10", "tasks.audio.classifier:ClassifierConfig")
