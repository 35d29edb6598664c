"""Training: one loop for everything that has `forward(batch) -> Output`."""

from zoo.train.checkpoint import CheckpointError, DiskFull, NonFinite, git_commit, read_manifest, versions
from zoo.train.loop import Diverged, Result, train
from zoo.train.recipe import Recipe, ResumeError, TrainConfig, load_run, newest_checkpoint, pick_device

__all__ = [
    "CheckpointError",
    "DiskFull",
    "Diverged",
    "NonFinite",
    "Recipe",
    "Result",
    "ResumeError",
    "TrainConfig",
    "git_commit",
    "load_run",
    "newest_checkpoint",
    "pick_device",
    "read_manifest",
    "train",
    "versions",
]
