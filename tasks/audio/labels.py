"""Conditions: the labels that a sound was made with, each as an embedding, and hidden now and then for guidance."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import init_normal


class Labels(nn.Module):
    """Labels (B, A) int64, one for each of A attributes -> (B, 1, C). The number after an attribute's last value stands
    for none.

    classes  how many values each attribute has
    dropout  in training, the share of the rows whose labels are all hidden, and of those with any one hidden
    """

    def __init__(self, classes: tuple[int, ...], width: int, dropout: float):
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.tables = nn.ModuleList(nn.Embedding(count + 1, width) for count in classes)
        init_normal(self.tables, 0.02)

    def none(self, rows: int, device: Any) -> Tensor:
        """(B, A): no label is known."""
        return torch.stack([torch.full((rows,), count, device=device) for count in self.classes], dim=1)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout:
            chance = torch.rand(len(labels), 1 + len(self.classes), device=labels.device) < self.dropout
            labels = torch.where(chance[:, :1] | chance[:, 1:], self.none(len(labels), labels.device), labels)
        parts = [table(labels[:, i]) for i, table in enumerate(self.tables)]
        return torch.stack(parts).sum(dim=0).unsqueeze(1)


def check_labels(classes: tuple[int, ...], dropout: float) -> None:
    """Raises ValueError."""
    if any(count < 1 for count in classes):
        raise ValueError(f"classes = {classes}; each attribute takes 1 or more values")
    if not 0 <= dropout < 1:
        raise ValueError(f"class_dropout = {dropout}; it takes a number from 0 up to, not including, 1")


def start_labels(labels: Labels | None, rows: int, condition: Any, device: Any) -> dict[str, Any]:
    """The part of a head's state that holds the condition. Raises ValueError for one that the model cannot take."""
    if labels is None:
        if condition is not None:
            raise ValueError("this model is unconditional (head.classes is empty): it takes no labels")
        return {}
    return {"labels": labels.none(rows, device) if condition is None else condition}


def without_labels(labels: Labels | None, state: Any) -> Any:
    if labels is None or not labels.dropout:
        raise ValueError(
            "guidance needs a conditional model that has met hidden labels: head.classes, and head.class_dropout above "
            f"0; this one has {() if labels is None else labels.classes} and {labels.dropout if labels else 0.0}"
        )
    return {**state, "labels": labels.none(len(state["labels"]), state["labels"].device)}
