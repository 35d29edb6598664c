"""A step recorded as a CUDA graph (zoo/recording.py), one for each shape of its inputs, and replayed: small models no
longer wait for Python.

The first steps of a shape are taken without a graph and are steps of the run like any other: they compile, choose tiles
and make the optimizer's state, so nothing has to be undone before recording. What a step reads from the host when it is
recorded stays as it was then; so what changes from step to step comes in as a tensor or a float, and everything that a
step leaves behind (weights, moments, average, guard) is written in place. Random numbers go on as they would without a
graph: each replay takes the generator's offset, and moves it on.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo import recording

SHAPES = 16  # that are recorded; steps of further ones run without a graph
WARM = 2  # steps of a shape before it is recorded


class GraphError(RuntimeError):
    """A step that cannot be recorded."""


class Recorder:
    """Calls `step(*inputs) -> outputs`, on the device and, from a shape's third call on, as a graph.

    inputs   trees (dataclasses, dicts, lists, tuples) of tensors, on any device, and plain values. A float reaches the
             step as a () tensor, since it may differ between calls; all other plain values belong to the shape.
    outputs  the same kind of tree; the caller's own copy
    The step may not wait for the device, nor replace tensors that the next step reads. Raises GraphError then.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device):
        self.step, self.device = step, device
        self.shapes: dict[Hashable, Shape] = {}
        cuda = device.type == "cuda"
        # One stream for first steps and recordings: what libraries keep for a stream is there before a recording
        self._stream: Any = torch.cuda.Stream(device) if cuda else None
        self._pool = torch.cuda.graph_pool_handle() if cuda else None

    def __call__(self, *inputs: Any) -> Any:
        name = signature(inputs)
        shape = self.shapes.get(name)
        if shape is None:
            shape = Shape(rebuilt(inputs, self._own))
            if len(self.shapes) >= SHAPES:
                return self._aside(shape)
            self.shapes[name] = shape
        else:
            shape.take(inputs)
        if shape.taken < WARM:
            shape.taken += 1
            return self._aside(shape)
        if shape.replay is None:
            try:
                call = partial(self.step, *shape.inputs)
                shape.outputs, shape.replay = recording.record(call, self._stream, pool=self._pool)
            except RuntimeError as error:
                raise GraphError(
                    f"this step cannot be recorded; train.graph=false runs it as it is: {error}"
                ) from error
        shape.replay()
        return rebuilt(shape.outputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

    def clear(self) -> None:
        """Forget all graphs: before the tensors, or the compiled code, that they use are given up."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        self.shapes.clear()

    def _own(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to(self.device, non_blocking=True, copy=True)
        if type(leaf) is float:  # torch's fused optimizers read a rate on a GPU as float32
            dtype = torch.float32 if self.device.type == "cuda" else torch.float64
            return torch.full((), leaf, dtype=dtype, device=self.device)
        return leaf

    def _aside(self, shape: "Shape") -> Any:
        """The step without a graph, on the stream of the recordings."""
        call = partial(self.step, *shape.inputs)
        return call() if self._stream is None else recording.on_stream(call, self._stream)


@dataclass
class Shape:
    """The graph of a shape, with the memory that it reads and writes: it lives as long as the graph."""

    inputs: Any
    taken: int = 0  # steps without a graph
    outputs: Any = None
    replay: Callable[[], None] | None = None

    def take(self, inputs: Any) -> None:
        for own, new in zip(leaves(self.inputs), leaves(inputs), strict=True):
            if isinstance(new, Tensor):
                own.copy_(new, non_blocking=True)
            elif type(new) is float:
                own.fill_(new)


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def leaves(tree: Any) -> Iterator[Any]:
    """In the order of `rebuilt`."""
    found: list[Any] = []
    rebuilt(tree, lambda leaf: found.append(leaf))
    yield from found


def rebuilt(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with its leaves changed."""
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: rebuilt(getattr(tree, f.name), change) for f in fields(tree)})
    if isinstance(tree, dict):
        return {name: rebuilt(part, change) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([rebuilt(part, change) for part in tree])
    return change(tree)


def signature(tree: Any) -> Hashable:
    """What two trees have in common that one graph can serve. Raises GraphError for a leaf that cannot be compared."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), *(signature(getattr(tree, f.name)) for f in fields(tree))
    if isinstance(tree, dict):
        return dict, *((name, signature(part)) for name, part in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree), *(signature(part) for part in tree)
    if not isinstance(tree, Hashable):
        raise GraphError(f"a batch holds a {type(tree).__name__}; a recorded step takes tensors and plain values")
    return float if type(tree) is float else (type(tree), tree)
