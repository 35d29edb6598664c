"""Text: tokenizers, corpora, next-token head, perplexity and bits per byte."""

from importlib import import_module

from zoo import registry

DATASETS = {
    "text/pystdlib": "PyStdlib",
    "text/wikitext2": "WikiText2",
    "text/tinyshakespeare": "TinyShakespeare",
    "text/gutenberg": "Gutenberg",
    "text/lambada": "Lambada",
    "text/folder": "Folder",
}


def register() -> None:
    """Names of the domain; what they stand for is imported on first use."""
    registry.tasks.add("text", "tasks.text.task:TextTask")
    for name, attribute in DATASETS.items():
        registry.datasets.add(name, f"tasks.text.data:{attribute}")
    import_module("tasks.text.models")
    registry.heads.add("text", "tasks.text.head:TextHead")
