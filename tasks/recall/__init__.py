"""Recall: synthetic tasks that ask a model for what stood earlier in its input."""

from importlib import import_module

from zoo import registry

DATASETS = {
    "recall/mqar": "MQAR",
    "recall/selective_copy": "SelectiveCopy",
    "recall/needle": "Needle",
}


def register() -> None:
    """Names of the domain; what they stand for is imported on first use."""
    registry.tasks.add("recall", "tasks.recall.task:RecallTask")
    for name, attribute in DATASETS.items():
        registry.datasets.add(name, f"tasks.recall.data:{attribute}")
    import_module("tasks.recall.models")
    registry.heads.add("recall", "tasks.recall.head:RecallHead")
