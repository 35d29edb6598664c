"""Drawings as moves of a pen: a domain for the zoo in a package of its own."""

from importlib import import_module

from zoo import registry


def register() -> None:
    """Names of the domain; what they stand for is imported on first use. The entry point leads here."""
    registry.tasks.add("strokes", "zoo_strokes.task:StrokesTask")
    registry.heads.add("strokes", "zoo_strokes.head:StrokesHead")
    registry.datasets.add("strokes/outlines", "zoo_strokes.data:Outlines")
    import_module("zoo_strokes.models")
