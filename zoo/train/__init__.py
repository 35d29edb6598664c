"""Training: one loop for everything that has `forward(batch) -> Output`."""

from zoo.train.loop import Result, train
from zoo.train.recipe import Recipe, TrainConfig, load_run

__all__ = ["Recipe", "Result", "TrainConfig", "load_run", "train"]
