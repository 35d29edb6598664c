"""Training: one loop for everything that has `forward(batch) -> Output`."""

from zoo.train.checkpoint import (
    CheckpointError,
    DiskFull,
    NonFinite,
    git_commit,
    read_manifest,
    versions,
    weights_digest,
)
from zoo.train.loop import Result, train
from zoo.train.parallel import ParallelConfig, start_ranks
from zoo.train.recipe import Recipe, ResumeError, TrainConfig, chosen_checkpoint, load_published, load_run, pick_device
from zoo.train.run import Diverged, autocast
from zoo.train.sweeps import Replica, sweep

__all__ = [
    "CheckpointError",
    "DiskFull",
    "Diverged",
    "NonFinite",
    "ParallelConfig",
    "Recipe",
    "Replica",
    "Result",
    "ResumeError",
    "TrainConfig",
    "autocast",
    "chosen_checkpoint",
    "git_commit",
    "load_published",
    "load_run",
    "pick_device",
    "read_manifest",
    "start_ranks",
    "sweep",
    "train",
    "versions",
    "weights_digest",
]
