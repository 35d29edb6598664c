"""Images as tokens: raw sub-pixels with an exact likelihood, or the codes of a learned tokenizer."""

from importlib import import_module

from zoo import registry

DATASETS = {
    "image/cifar10": "tasks.image.data:Cifar10",
    "image/mnist": "tasks.image.data:Mnist",
    "image/fashion_mnist": "tasks.image.data:FashionMnist",
    "image/folder": "tasks.image.folder:Folder",
}
TASKS = {
    "image": "tasks.image.task:ImageTask",
    "image_tokenizer": "tasks.image.tokenizer:TokenizerTask",
    "image_classifier": "tasks.image.classifier:ClassifierTask",
}


def register() -> None:
    """Names of the domain; what they stand for is imported on first use."""
    for name, target in TASKS.items():
        registry.tasks.add(name, target)
    for name, target in DATASETS.items():
        registry.datasets.add(name, target)
    import_module("tasks.image.models")
    registry.heads.add("image", "tasks.image.head:ImageHead")
    registry.heads.add("image_pixels", "tasks.image.pixel_head:PixelHead")
