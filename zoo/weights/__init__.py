"""Weights: safetensors files, the published ones among them, and the hub."""

from zoo.weights.files import (
    LABEL,
    MAX_HEADER,
    WeightsError,
    load_into,
    named_tensors,
    read,
    replace_file,
    save,
    sync_folder,
    to_bytes,
    write_file,
)
from zoo.weights.published import (
    Card,
    Published,
    Row,
    add_table,
    find,
    load_pretrained,
    open_card,
    tags_of,
    weights,
)

__all__ = [
    "LABEL",
    "MAX_HEADER",
    "Card",
    "Published",
    "Row",
    "WeightsError",
    "add_table",
    "find",
    "load_into",
    "load_pretrained",
    "named_tensors",
    "open_card",
    "read",
    "replace_file",
    "save",
    "sync_folder",
    "tags_of",
    "to_bytes",
    "weights",
    "write_file",
]
