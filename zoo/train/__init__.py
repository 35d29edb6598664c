"""Training: one loop for everything that has `forward(batch) -> Output`."""

from zoo.train.checkpoint import CheckpointError, DiskFull, NonFinite, git_commit
from zoo.train.loop import Result, train
from zoo.train.parallel import ParallelConfig
from zoo.train.recipe import Recipe, ResumeError, TrainConfig, load_run
from zoo.train.run import Diverged

__all__ = [
    "CheckpointError",
    "DiskFull",
    "Diverged",
    "NonFinite",
    "ParallelConfig",
    "Recipe",
    "Result",
    "ResumeError",
    "TrainConfig",
    "git_commit",
    "load_run",
    "train",
]
